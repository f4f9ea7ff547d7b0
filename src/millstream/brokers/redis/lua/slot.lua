-- slot.lua: store the event of one slot of a schedule, and that it was.
-- USES     store
-- KEYS     slots; log, later, ids0, ids1, ids2, meta of the partition of the event
-- ARGV     schedule, the slot's moment in ms, dedupe ms, dedupe ids, ceiling in events, 1 when it is a size; then the event: due
--          in ms or '', and the seven values of the entry; or nothing, to pass the slot over
-- RETURNS  {1} | {0}: this slot, or a later one, was there already | {the refusal of `store`}: nothing is written then
-- Why      Every process that runs the schedule comes with the same slot: one step decides which of them stores it. A
--          process that got no answer comes again.
-- Cost     O(1)
local slots, schedule, at = KEYS[1], ARGV[1], ARGV[2]

local last = redis.call('HGET', slots, schedule)
if last and tonumber(last) >= tonumber(at) then return {0} end
if #ARGV > 6 then
  local policy = {dedupe_ms = ARGV[3], dedupe_ids = ARGV[4], ceiling = ARGV[5], weighed = ARGV[6]}
  local stored = store(2, policy, {unpack(ARGV, 8, 14)}, ARGV[7])
  if type(stored) == 'table' then return {stored} end
end
redis.call('HSET', slots, schedule, at)
return {1}
