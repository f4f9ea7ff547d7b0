-- outputs.lua: store what a handler published, all of it or nothing. To be used behind `store`.
-- CALL     publish(outputs, blobs)
--            outputs  each {first, the six numbers of the policy, due, derived, blob, bounded}: the first key and the policy
--                     of its target, as in `store`; which of the blobs in ARGV behind `blobs` is the first of its seven
--                     values; true when none may go past the ceiling, since they follow from several events
-- RETURNS  nil: all are stored | why not, in the words of `store`, and for which of them: none is stored
-- Why      A script is not a transaction, so all are asked for room before the first is written; then only maxmemory can
--          refuse, and only the first. Those of one event may take a stream past its ceiling together: eight could never
--          enter one of five.
--          What is derived from the event that was handled is no repeat, since its outcome is stored once.
-- Cost     O(outputs), 4 µs each, 6 where ids are remembered
local publish
do
  local policies = {}

  local function policy_of(output)
    local first = output[1]
    if not policies[first] then
      policies[first] = {dedupe_ms = output[2], dedupe_ids = output[3], ceiling = output[4], weighed = output[5],
        logs = output[6], parts = output[7]}
    end
    return policies[first]
  end

  function publish(outputs, blobs)
    local several = #outputs > 1 -- one alone is asked when it is stored
    local before = {} -- how many were let in of each stream, by where its logs begin
    for n, output in ipairs(several and outputs or {}) do
      local logs = output[6]
      local more = output[11] and before[logs] or 0
      local refused = room(output[1], policy_of(output), ARGV[blobs + output[10]], output[8], output[9], more)
      if refused then return refused.err, n end
      before[logs] = (before[logs] or 0) + 1
    end
    for n, output in ipairs(outputs) do
      local at = blobs + output[10]
      local stored = store(output[1], policy_of(output), {unpack(ARGV, at, at + 6)}, output[8], output[9], several)
      if type(stored) == 'table' then return stored.err, n end
    end
  end
end
