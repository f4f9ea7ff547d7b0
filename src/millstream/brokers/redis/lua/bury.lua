-- bury.lua: forget a consumer, after `evict` answered done for every partition of its unit.
-- KEYS     fence, live
-- ARGV     consumer, score: its tick as it was seen, or ''
-- RETURNS  OK | ALIVE: it has beaten since
-- Why      Whoever evicts may die halfway. As long as the name is in `live`, everybody finds it silent and goes on.
-- Cost     O(log members)
local fence, live = KEYS[1], KEYS[2]
local beat = redis.call('ZSCORE', live, ARGV[1])
if beat and beat ~= ARGV[2] then return 'ALIVE' end
redis.call('DEL', fence)
redis.call('ZREM', live, ARGV[1])
return 'OK'
