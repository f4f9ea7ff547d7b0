-- lose.lua: count events that were gone before the owner of their partition read them, in the order of keys.
-- USES     ids
-- KEYS     log, lease, stats
-- ARGV     group, member, epoch; the gap: the last id that was read, how many were ever added up to there, and behind the gap
-- RETURNS  OK | LOST: the lease is not ours
-- Why      The count and the note of it in the lease are one step: else the next owner, which begins at the mark before the
--          gap, would count it again. A repeat, after a lost answer, finds its note. What lies before the mark is history.
--          Where the mark stands at the gap it passes it at once, so that the lag is right although nothing follows.
-- Cost     O(gaps behind the mark)
local log, lease, stats = unpack(KEYS)
local group, me, epoch, offset, from, to = unpack(ARGV)
local known = redis.call('HMGET', lease, 'owner', 'epoch', 'w', 'wn', 'gaps')
if known[1] ~= me or known[2] ~= epoch then return 'LOST' end
local w, wn, gap, gaps = known[3], known[4], offset .. ':' .. from .. ':' .. to, {}
for other, rest in string.gmatch(known[5] or '', '(%S+)(:%d+:%d+)') do
  if other .. rest == gap then return 'OK' end
  if not before(other, w) then gaps[#gaps + 1] = other .. rest end
end
gaps[#gaps + 1] = gap
redis.call('HSET', lease, 'gaps', table.concat(gaps, ' '))
redis.call('HINCRBY', stats, 'lost', string.format('%.0f', to - from))
if offset == w and wn ~= '' then
  wn = string.format('%.0f', wn + to - from)
  redis.call('HSET', lease, 'wn', wn)
  redis.pcall('XGROUP', 'SETID', log, group, w, 'ENTRIESREAD', wn)
end
return 'OK'
