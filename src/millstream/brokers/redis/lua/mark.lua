-- mark.lua: note durably that the handlers of these suspects start now.
-- KEYS     note, fence
-- ARGV     nonce, ids
-- RETURNS  OK | FENCED
-- Why      Of the many events that a crash leaves behind only those that were running can have caused it. Without this
--          mark, written before the handler starts, innocents would be blamed or all of them would have to run alone.
-- Cost     O(ids)
local note, fence = KEYS[1], KEYS[2]
if redis.call('GET', fence) ~= ARGV[1] then return 'FENCED' end
redis.call('PERSIST', fence)
for i = 2, #ARGV do
  local mark = redis.call('HGET', note, ARGV[i]) or '0'
  if string.sub(mark, -1) ~= 's' then redis.call('HSET', note, ARGV[i], mark .. 's') end
end
return 'OK'
