-- ask.lua: ask the owner of a lease for it.
-- KEYS     lease
-- ARGV     member; owner, epoch and want as they were seen
-- RETURNS  1 | 0: it has changed since
-- Why      Two may ask at the same time: the first one is heard.
-- Cost     O(1)
local known = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'want')
for i = 1, 3 do
  if known[i] ~= ARGV[i + 1] then return 0 end
end
redis.call('PERSIST', KEYS[1])
redis.call('HSET', KEYS[1], 'want', ARGV[1])
return 1
