-- beat.lua: a consumer says that it lives, and learns the server's time and what is due.
-- KEYS     fence, live, tick, then due of each partition of the unit
-- ARGV     consumer, nonce
-- RETURNS  {OK, tick, server ms, first due ms or '', how many wait, … (two per partition)} | {FENCED}
-- Why      A beat is a logical tick, not a time: observers measure silence with their own monotonic clocks, so a step of
--          the server's clock, or a master whose clock is ahead, kills nobody. Beats write `live` and never the fence,
--          which would look like a takeover to those who WATCH it.
-- Cost     O(log members + partitions)
local fence, live, tick = KEYS[1], KEYS[2], KEYS[3]
local consumer, nonce = ARGV[1], ARGV[2]
if redis.call('GET', fence) ~= nonce then return {'FENCED'} end
redis.call('PERSIST', fence)
local beats = redis.call('INCR', tick)
redis.call('ZADD', live, beats, consumer)
local time = redis.call('TIME')
local answer = {'OK', beats, time[1] * 1000 + math.floor(time[2] / 1000)}
for i = 4, #KEYS do
  answer[#answer + 1] = redis.call('ZRANGE', KEYS[i], 0, 0, 'WITHSCORES')[2] or ''
  answer[#answer + 1] = redis.call('ZCARD', KEYS[i])
end
return answer
