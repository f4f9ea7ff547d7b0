-- ack.lua: finish deliveries, by script where MULTI does not work.
-- KEYS     log, fence
-- ARGV     group, nonce, ids (at most 1,000)
-- RETURNS  {OK, how many were pending} | {FENCED}
-- Why      At maxmemory Redis before 8 refuses to queue anything behind MULTI, so that no ack would work just when acks
--          would free memory. A script may call XACK then.
-- Cost     O(ids)
local log, fence = KEYS[1], KEYS[2]
if redis.call('GET', fence) ~= ARGV[2] then return {'FENCED'} end
return {'OK', redis.call('XACK', log, ARGV[1], unpack(ARGV, 3))}
