-- park.lua: give a dead letter back to a group in the order of keys: its event joins the end of its key.
-- KEYS     dead, parked, parkinfo, list of the event key, stats
-- ARGV     letter: its id in `dead`; event key; event, as it is parked
-- RETURNS  1 | 0: the letter is gone
-- Why      The log has gone on, and other events of the key may be waiting: what comes back comes behind them.
--          XDEL goes first since it may grow nothing: at maxmemory RPUSH is refused, but not after it.
-- Cost     O(1)
local dead, parked, parkinfo, list, stats = unpack(KEYS)
local letter, key, event = unpack(ARGV)
if redis.call('XDEL', dead, letter) == 0 then return 0 end
local time = redis.call('TIME')
redis.call('RPUSH', list, event)
if redis.call('ZADD', parked, 'NX', 0, key) == 1 then
  redis.call('HSET', parkinfo, '=' .. key, string.format('0 0 %.0f ', time[1] * 1000 + math.floor(time[2] / 1000)))
end
redis.call('HINCRBY', parkinfo, '#n', 1)
redis.call('HINCRBY', stats, 'replayed', 1)
return 1
