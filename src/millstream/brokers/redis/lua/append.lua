-- append.lua: store records in one partition of a stream that remembers ids, has a ceiling, or takes events for later.
-- USES     store
-- KEYS     log, later, ids0, ids1, ids2, meta; with a ceiling the logs of all partitions
-- ARGV     the policy in six numbers, see `store`; then eight per record: due in ms or '', and the seven values of the entry
-- RETURNS  per record what `store` answers, up to the first that is refused: nothing behind that one is stored
-- Why      Looking an id up, storing the event and remembering the id must be one step: two publishers of one id come at the
--          same time, and a publisher that got no answer comes again.
-- Cost     O(records); 200 small ones with dedupe 1.0 ms, 1 MB of them 3.2 ms
local policy = policy_at(1)
local results = {}
for i = 7, #ARGV, 8 do
  local result = store(1, policy, {unpack(ARGV, i + 1, i + 7)}, ARGV[i])
  results[#results + 1] = result
  if type(result) == 'table' then break end
end
return results
