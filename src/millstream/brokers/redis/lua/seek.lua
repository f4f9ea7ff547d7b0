-- seek.lua: move a group in the order of keys to another place in one partition.
-- USES     ids
-- KEYS     log, lease, parked, parkinfo, note, then the list of each parked key
-- ARGV     group, start: '$', or the id behind which it goes on; the parked keys
-- RETURNS  OK | AGAIN: other keys are parked than those given
-- Why      A living owner would store its own progress over it, so the lease is taken away: owner empty, epoch one more.
--          `h` and `open` would hide what is to be seen again. What is parked behind the new place comes again from the
--          log, and would come twice; what is parked before it stays.
--          A place behind the end is the end: else the log would look as if it had lost something. Not so a time to come.
-- Cost     O(parked events)
local log, lease, parked, parkinfo, note = unpack(KEYS, 1, 5)
local group, w = ARGV[1], ARGV[2]

if redis.call('ZCARD', parked) ~= #ARGV - 2 then return 'AGAIN' end
for i = 3, #ARGV do
  if not redis.call('ZSCORE', parked, ARGV[i]) then return 'AGAIN' end
end
redis.call('XACK', log, group, '0-1')
local info = {['last-generated-id'] = '0-0', ['entries-added'] = 0, length = 0}
if redis.call('EXISTS', log) == 1 then
  info = named(redis.call('XINFO', 'STREAM', log))
end
local last, added = info['last-generated-id'], info['entries-added']
local first = info['first-entry'] and info['first-entry'][1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ahead = w ~= '$' and future(w)
if w == '$' or (before(last, w) and not ahead) then w = last end
local wn = ''
if added and w == last then wn = string.format('%.0f', added) end
if added and w ~= last and not ahead and (not first or before(w, first)) then
  wn = string.format('%.0f', added - info.length)
end

local gone = 0
for i = 3, #ARGV do
  local key, list, stay = ARGV[i], KEYS[i + 3], {}
  local events = redis.call('LRANGE', list, 0, -1)
  for _, event in ipairs(events) do
    if not before(w, string.match(event, '^%S+')) then stay[#stay + 1] = event end
  end
  if #stay < #events then
    redis.call('DEL', list)
    for _, event in ipairs(stay) do redis.call('RPUSH', list, event) end
    gone = gone + #events - #stay
  end
  if #stay == 0 then
    redis.call('ZREM', parked, key)
    redis.call('HDEL', parkinfo, '=' .. key)
  elseif stay[1] ~= events[1] then
    redis.call('ZADD', parked, 0, key)
    local since = string.match(redis.call('HGET', parkinfo, '=' .. key) or '', '^%d+ %d+ (%d+)') or '0'
    redis.call('HSET', parkinfo, '=' .. key, '0 0 ' .. since .. ' ')
  end
end
if gone > 0 then redis.call('HINCRBY', parkinfo, '#n', -gone) end
redis.call('DEL', note)
local epoch = redis.call('HGET', lease, 'epoch') or 0
redis.call('HSET', lease, 'owner', '', 'epoch', string.format('%.0f', math.max(epoch + 1, now)), 'want', '', 'next', '',
  'clean', 1, 'was', 1, 'w', w, 'wn', wn, 'h', '', 'open', '', 'gaps', '')
redis.call('XGROUP', 'SETID', log, group, w, unpack(wn ~= '' and {'ENTRIESREAD', wn} or {}))
return 'OK'
