-- free.lua: let a parked key be tried at once, as if for the first time.
-- KEYS     parked, parkinfo, note, list of the event key
-- ARGV     event key
-- RETURNS  1 | 0: nothing is parked of it
-- Why      Attempts and crashes are those of the first event: a person has mended what made it fail.
-- Cost     O(log parked keys)
local parked, parkinfo, note, list = unpack(KEYS)
local head = redis.call('LINDEX', list, 0)
if not head then return 0 end
redis.call('PERSIST', list)
redis.call('ZADD', parked, 0, ARGV[1])
local info = redis.call('HGET', parkinfo, '=' .. ARGV[1]) or ''
redis.call('HSET', parkinfo, '=' .. ARGV[1], '0 0 ' .. (string.match(info, '^%d+ %d+ (%d+)') or '0') .. ' ')
redis.call('HDEL', note, string.match(head, '^%S+'))
return 1
