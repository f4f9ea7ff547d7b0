-- begin.lua: note durably that the handlers of these suspects start now, in the order of keys.
-- KEYS     lease, note
-- ARGV     member, epoch, ids
-- RETURNS  OK | LOST
-- Why      As in `mark.lua`; here the lease is the right.
-- Cost     O(ids)
local lease, note = KEYS[1], KEYS[2]
local known = redis.call('HMGET', lease, 'owner', 'epoch')
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] then return 'LOST' end
redis.call('PERSIST', lease)
for i = 3, #ARGV do
  local crashes = string.match(redis.call('HGET', note, ARGV[i]) or '', '^%d+') or '0'
  redis.call('HSET', note, ARGV[i], crashes .. 's')
end
return 'OK'
