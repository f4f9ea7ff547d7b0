-- acquire.lua: take the lease of one partition that is free, or whose owner is silent.
-- USES     ids
-- KEYS     log, fence, live, lease, meta, parked, parkinfo, note, stats
-- ARGV     group, member, nonce, owner and epoch as they were seen, score of a silent owner or '', the member's former names
-- RETURNS  {OK, epoch, w, wn, h, open, clean 1 | 0, last id, lost, regressed 1 | 0, events parked, {parked key, …},
--           {id, crashes, …}, gaps from the mark on} | {HELD}: it is not as it was seen | {FENCED} | {MODE, mode}
-- Why      The lease is the truth, the group's id its mirror. A mirror that is ahead was moved by a foreign reader, and is
--          set back; one that is behind was moved back by a person, and is followed. A log that ends before `w`, or that
--          ever got fewer entries, is another one (flush, a failover that lost some): then `w` means nothing.
--          `wn` counts the entries ever added up to `w`, so what was trimmed unread is known to the event, see losses.lua.
--          What the last owner has counted, see lose.lua, is not counted again. Redis 6.2 counts nothing: `wn` stays empty.
--          The epoch is the server's time at least: it grows even over a failover that forgot the last owner.
--          Who crashed is told from who left: what was marked as running in a crash, `ks`, becomes `k+1`. A member that
--          takes its own lease again (the answer was lost, or its former life ended) has not crashed.
-- Cost     O(groups + parked keys + notes), and two bodies in XINFO STREAM; once per owner
local log, fence, live, lease, meta, parked, parkinfo, note, stats = unpack(KEYS)
local group, me, nonce, seen_owner, seen_epoch, silent = unpack(ARGV, 1, 6)

if redis.call('GET', fence) ~= nonce then return {'FENCED'} end
local mode = redis.call('HGET', meta, 'mode:' .. group)
if mode and mode ~= 'log' then return {'MODE', mode} end
local known = redis.call('HMGET', lease, 'owner', 'epoch', 'w', 'wn', 'h', 'open', 'clean', 'was', 'gaps')
local owner, epoch = known[1] or '', known[2] or '0'
if owner ~= seen_owner or epoch ~= seen_epoch then return {'HELD'} end
local clean = owner == '' and known[7] ~= '0'
for i = 7, #ARGV do clean = clean or owner == ARGV[i] end
local again = owner == me
if again then clean = known[8] ~= '0' end
if owner ~= '' and not again and not clean then
  local beat = redis.call('ZSCORE', live, owner)
  if beat and beat ~= silent then return {'HELD'} end
end
local parked_keys = redis.call('ZRANGE', parked, 0, -1)
local events_parked = tonumber(redis.call('HGET', parkinfo, '#n') or 0)
local marks = redis.call('HGETALL', note)
redis.call('XACK', log, group, '0-1')

local w, wn, h, open, gaps = known[3], known[4] or '', known[5] or '', known[6] or '', known[9] or ''
local at, read
if redis.call('EXISTS', log) == 1 then
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', log)) do
    local fields = named(info)
    if fields.name == group then at, read = fields['last-delivered-id'], fields['entries-read'] end
  end
end
if not at then
  at = w or string.match(redis.call('HGET', meta, 'start:' .. group) or '', '^(%S+)') or '0-0'
  redis.call('XGROUP', 'CREATE', log, group, at, 'MKSTREAM')
end
local info = named(redis.call('XINFO', 'STREAM', log))
local last, added = info['last-generated-id'], info['entries-added']
local first = info['first-entry'] and info['first-entry'][1]
local removed = added and added - info.length

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local regressed, lost = 0, 0
if w and (before(last, w) and not (wn == '' and future(w)) or (added and wn ~= '' and added < tonumber(wn))) then
  regressed, w, wn, h, open, gaps = 1, '0-0', '', '', '', ''
elseif not w or before(at, w) then
  wn = not w and read or ''
  w, h, open, gaps = at, '', '', ''
  if before(last, w) and not future(w) then w, wn = last, '' end
end
local behind_removed = not first or before(w, first)
if added and wn == '' then
  if w == last then wn = added elseif behind_removed and not future(w) then wn = removed end
elseif added and (behind_removed or w == last) then
  local missed = math.max(0, (behind_removed and removed or added) - wn)
  if missed > 0 then
    lost, wn = missed, wn + missed
    for offset, from, to in string.gmatch(gaps, '(%S+):(%d+):(%d+)') do
      if before(w, offset) then lost = lost - (to - from) end
    end
    lost, gaps = math.max(0, lost), ''
  end
end
if lost > 0 then redis.call('HINCRBY', stats, 'lost', lost) end
if wn ~= '' then wn = string.format('%.0f', wn) end

local crashes = {}
for i = 1, #marks, 2 do
  local count, running = string.match(marks[i + 1], '^(%d+)(s?)$')
  if count and running == 's' and not again then
    count = clean and count or string.format('%.0f', count + 1)
    redis.call('HSET', note, marks[i], count)
  end
  crashes[#crashes + 1] = marks[i]
  crashes[#crashes + 1] = count or '0'
end
epoch = string.format('%.0f', math.max(epoch + 1, now))
redis.call('HSET', lease, 'owner', me, 'epoch', epoch, 'seq', 0, 'clean', 0, 'was', clean and 1 or 0, 'want', '', 'next', '',
  'w', w, 'wn', wn, 'h', h, 'open', open, 'gaps', gaps)
redis.call('HSET', meta, 'seen:' .. group, string.format('%.0f', now))
redis.call('XGROUP', 'SETID', log, group, w, unpack(wn ~= '' and {'ENTRIESREAD', wn} or {}))
return {'OK', epoch, w, wn, h, open, clean and 1 or 0, last, lost, regressed, events_parked, parked_keys, crashes, gaps}
