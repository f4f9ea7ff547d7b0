-- slot.lua: store the event of one slot of a schedule, and that it was.
-- USES     store
-- KEYS     slots; log, later, ids0, ids1, ids2, meta of the partition of the event; with a ceiling the logs of all partitions
-- ARGV     schedule, the slot's moment in ms, the policy in six numbers, see `store`; then the event: due in ms or '', and the
--          seven values of the entry; or nothing, to pass the slot over
-- RETURNS  {1} | {0}: this slot, or a later one, was there already | {the refusal of `store`}: nothing is written then
-- Why      Every process that runs the schedule comes with the same slot: one step decides which of them stores it. A
--          process that got no answer comes again.
-- Cost     O(1)
local slots, schedule, at = KEYS[1], ARGV[1], ARGV[2]

local last = redis.call('HGET', slots, schedule)
if last and tonumber(last) >= tonumber(at) then return {0} end
if #ARGV > 8 then
  local stored = store(2, policy_at(3), {unpack(ARGV, 10, 16)}, ARGV[9])
  if type(stored) == 'table' then return {stored} end
end
redis.call('HSET', slots, schedule, at)
return {1}
