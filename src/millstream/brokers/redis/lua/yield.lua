-- yield.lua: give the lease of one partition back.
-- KEYS     lease
-- ARGV     member, epoch, heir: to whom it is promised, or ''
-- RETURNS  OK | LOST
-- Why      Who leaves in order has killed nobody: the next owner need not suspect anything (`clean`).
-- Cost     O(1)
local known = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] then return 'LOST' end
redis.call('PERSIST', KEYS[1])
redis.call('HSET', KEYS[1], 'owner', '', 'next', ARGV[3], 'want', '', 'clean', 1)
return 'OK'
