-- discard.lua: discard all that is parked of a key, for ever.
-- KEYS     parked, parkinfo, note, list of the event key
-- ARGV     event key
-- RETURNS  how many events
-- Why      If the first one is running, its outcome finds nothing any more, and changes nothing.
-- Cost     O(events)
local parked, parkinfo, note, list = unpack(KEYS)
local count = redis.call('LLEN', list)
if count > 0 then redis.call('HDEL', note, string.match(redis.call('LINDEX', list, 0), '^%S+')) end
redis.call('DEL', list)
redis.call('ZREM', parked, ARGV[1])
redis.call('HDEL', parkinfo, '=' .. ARGV[1])
if count > 0 then redis.call('HINCRBY', parkinfo, '#n', -count) end
return count
