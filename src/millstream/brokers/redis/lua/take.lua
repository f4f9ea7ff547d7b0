-- take.lua: hand out entries of one partition that wait and are due by the server's clock.
-- USES     parts
-- KEYS     log, fence, due, note, stats
-- ARGV     group, consumer, nonce, limit
-- RETURNS  {OK, first due ms of what still waits or '', how many bodies were gone,
--           {id, count, note, postponed, fields, of a pack of which not all is left: `0,3`}, …} | {FENCED}
-- Why      Two consumers may take at once, a foreign client may have claimed or acked an entry, its body may be trimmed:
--          all is looked at and changed in one step per id. Only what `~due` owns is ours to hand out; for the rest the
--          id leaves `due`. XCLAIM without JUSTID counts the attempt before its handler runs.
--          A trimmed body is counted as lost: 7.0 drops such an entry silently, 6.2 keeps it pending.
-- Cost     O(limit), stops past 1 MB of bodies; 100 entries 1.8 ms
local log, fence, due, note, stats = unpack(KEYS)
local group, consumer, nonce, limit = unpack(ARGV)
local MAX_BYTES = 1048576

if redis.call('GET', fence) ~= nonce then return {'FENCED'} end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local ids = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, limit)
local answer, bytes, lost = {'OK', '', 0}, 0, 0
if #ids > 0 then redis.call('XACK', log, group, '0-1') end
for _, id in ipairs(ids) do
  if bytes > MAX_BYTES then break end
  local pending = redis.call('XPENDING', log, group, id, id, 1)[1]
  if pending and pending[2] == '~due' then
    local entry = redis.call('XCLAIM', log, group, consumer, 0, id)[1]
    if entry and entry[2] then
      local notes = redis.call('HMGET', note, id, '+' .. id, '*' .. id)
      local left = handed(note, id, notes[3])
      answer[#answer + 1] = {id, pending[4] + 1, notes[1] or '', notes[2] or '0', entry[2], left}
      for _, word in ipairs(entry[2]) do bytes = bytes + #word end
    else
      redis.call('XACK', log, group, id)
      redis.call('HDEL', note, id, '+' .. id, '*' .. id)
      lost = lost + 1
    end
  else
    redis.call('HDEL', note, id, '+' .. id, '*' .. id)
  end
  redis.call('ZREM', due, id)
end
if lost > 0 then redis.call('HINCRBY', stats, 'lost', lost) end
answer[2] = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')[2] or ''
answer[3] = lost
return answer
