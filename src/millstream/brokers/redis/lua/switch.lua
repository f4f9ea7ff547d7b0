-- switch.lua: let a group consume one partition in the other way.
-- KEYS     log, meta, due, lease, parked, live
-- ARGV     group, mode: 'queue' or 'log'; after how many ms without a sweep all members are dead; go: 1, or 0 to look only
-- RETURNS  1 | 0: it is not at rest
-- Why      What is pending, waiting or parked belongs to one way and is unknown to the other: it would never be handled. And
--          while members of both ways read, the one moves the group's id under the other.
-- Cost     O(consumers)
local log, meta, due, lease, parked, live = unpack(KEYS)
local group, mode, silence, go = unpack(ARGV)

if redis.call('HGET', meta, 'mode:' .. group) == mode then return 1 end
local summary = redis.pcall('XPENDING', log, group)
if not summary.err and summary[1] > 0 then return 0 end
local known = redis.call('HMGET', lease, 'owner', 'h', 'w', 'wn')
local owned = known[1] and known[1] ~= '' and redis.call('ZSCORE', live, known[1])
if owned or (known[2] or '') ~= '' or redis.call('ZCARD', parked) > 0 or redis.call('ZCARD', due) > 0 then return 0 end
local time = redis.call('TIME')
local seen = redis.call('HMGET', meta, 'seen:' .. group, 'entered:' .. group)
local alive = time[1] * 1000 - math.max(seen[1] or 0, seen[2] or 0) < tonumber(silence)
if mode == 'log' and alive and redis.call('ZCARD', live) > 0 then return 0 end
if go == '0' then return 1 end
redis.call('XACK', log, group, '0-1')
if known[3] then redis.call('HSET', meta, 'low:' .. group, known[3] .. ' ' .. (known[4] or '')) end
redis.call('HSET', meta, 'mode:' .. group, mode)
if mode == 'queue' then redis.call('HDEL', lease, 'w', 'wn', 'owner') end
return 1
