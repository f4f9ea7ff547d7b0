-- heads.lua: begin the first events of parked keys that are due, and count it before their handlers run.
-- KEYS     lease, parked, parkinfo, note, then the list of each key
-- ARGV     member, epoch, event keys
-- RETURNS  {OK, {key, event, attempts, postponed, crashes}, …} | {LOST}
-- Why      A head may kill its process, again and again: the attempt is counted here, and the note `ks` says that it is
--          running now. Who asks again for what is marked has not seen the answer to its first question: it counts once.
--          A person may have released or dropped the key meanwhile, so all is looked at again.
-- Cost     O(keys), stops past 1 MB of events: the rest stays due
local lease, parked, parkinfo, note = unpack(KEYS, 1, 4)
local MAX_BYTES = 1048576

local known = redis.call('HMGET', lease, 'owner', 'epoch')
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] then return {'LOST'} end
redis.call('PERSIST', lease)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply, bytes = {'OK'}, 0
for i = 3, #ARGV do
  local key, list = ARGV[i], KEYS[i + 2]
  local due = tonumber(redis.call('ZSCORE', parked, key) or 'inf')
  if bytes > MAX_BYTES then break end
  if due <= now then
    local head = redis.call('LINDEX', list, 0)
    if head then
      local info = redis.call('HGET', parkinfo, '=' .. key) or ''
      local attempts, postponed, rest = string.match(info, '^(%d+) (%d+) (.*)$')
      local id = string.match(head, '^%S+')
      local crashes, running = string.match(redis.call('HGET', note, id) or '0', '^(%d+)(s?)')
      attempts, postponed = (attempts or 0) + (running == 's' and 0 or 1), postponed or '0'
      rest = rest or string.format('%.0f ', now)
      redis.call('HSET', parkinfo, '=' .. key, string.format('%.0f %s %s', attempts, postponed, rest))
      redis.call('HSET', note, id, crashes .. 's')
      reply[#reply + 1] = {key, head, attempts, postponed, crashes}
      bytes = bytes + #head
    else -- somebody has deleted the list
      redis.call('ZREM', parked, key)
      redis.call('HDEL', parkinfo, '=' .. key)
    end
  end
end
return reply
