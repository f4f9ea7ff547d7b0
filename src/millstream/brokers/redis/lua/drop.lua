-- drop.lua: discard a dead letter for ever.
-- KEYS     dead, stats
-- ARGV     letter: its id in `dead`
-- RETURNS  1 | 0: it is gone already
-- Why      The counter and the letter change together, so that the sums of a group stay right.
-- Cost     O(1)
if redis.call('XDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HINCRBY', KEYS[2], 'dropped', 1)
return 1
