-- recall.lua: hand out once more what was delivered to us, and never seen by us.
-- USES     parts
-- KEYS     log, fence, note, stats
-- ARGV     group, consumer, nonce, ids (at most 200)
-- RETURNS  {OK, '', how many bodies were gone, {id, count, note, postponed, fields, left}, …}, as `take` does | {FENCED}
-- Why      When the reply of a read or of `take` is lost, entries are pending under a living consumer and in nobody's
--          memory, and what a living consumer holds is never taken away. Reading one's own history would count one more
--          attempt on every call, on this server only; XCLAIM with the same RETRYCOUNT counts nothing.
-- Cost     O(ids), stops past 1 MB of bodies: the rest is found by the next recovery
local log, fence, note, stats = unpack(KEYS)
local group, consumer, nonce = unpack(ARGV, 1, 3)
local MAX_BYTES = 1048576

if redis.call('GET', fence) ~= nonce then return {'FENCED'} end
redis.call('XACK', log, group, '0-1')
local answer, bytes, lost = {'OK', '', 0}, 0, 0
for i = 4, #ARGV do
  if bytes > MAX_BYTES then break end
  local id = ARGV[i]
  local pending = redis.call('XPENDING', log, group, id, id, 1)[1]
  if pending and pending[2] == consumer then
    local entry = redis.call('XCLAIM', log, group, consumer, 0, id, 'RETRYCOUNT', pending[4])[1]
    if entry and entry[2] then
      local notes = redis.call('HMGET', note, id, '+' .. id, '*' .. id)
      local left = handed(note, id, notes[3])
      answer[#answer + 1] = {id, pending[4], notes[1] or '', notes[2] or '0', entry[2], left}
      for _, word in ipairs(entry[2]) do bytes = bytes + #word end
    else
      redis.call('XACK', log, group, id)
      redis.call('HDEL', note, id, '+' .. id, '*' .. id)
      lost = lost + 1
    end
  end
end
if lost > 0 then redis.call('HINCRBY', stats, 'lost', lost) end
answer[3] = lost
return answer
