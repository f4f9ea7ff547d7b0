-- enter.lua: a consumer begins to live, under a name that is used once.
-- KEYS     fence, live, tick
-- ARGV     consumer, nonce
-- RETURNS  {OK, tick, server ms} | {NAME}: the name has a fence already, take another
-- Why      The fence is the right to settle. It is made here and nowhere else, so a consumer that was taken over cannot
--          make itself a new one after a reconnect. It has no TTL: a TTL would have to be renewed, and a renewal counts
--          as a change for those who WATCH it.
--          PERSIST goes first since it may grow nothing: at maxmemory Redis refuses SET, but not after a first write.
-- Cost     O(log members)
local fence, live, tick = KEYS[1], KEYS[2], KEYS[3]
local consumer, nonce = ARGV[1], ARGV[2]
if redis.call('EXISTS', fence) == 1 then return {'NAME'} end
redis.call('PERSIST', fence)
redis.call('SET', fence, nonce)
local beats = redis.call('INCR', tick)
redis.call('ZADD', live, beats, consumer)
local time = redis.call('TIME')
return {'OK', beats, time[1] * 1000 + math.floor(time[2] / 1000)}
