-- join.lua: make sure that a group exists on one partition, where it belongs.
-- USES     ids
-- KEYS     log, meta, due, note; and lease in the order of keys
-- ARGV     group, owner, start: '$', or the id behind which a new group begins; mode: 'log', or 'queue' when left out
-- RETURNS  {OK, 0 it was there | 1 born now | 2 healed} | {MODE, mode} | {OWNER, owner}
-- Why      A group that vanished (flush, XGROUP DESTROY, lost on failover) is made again where everything before it was
--          settled: at `low`, as the last sweep found it, else where it began. Both hold only while the log reaches that
--          far: a log that was made anew may have lower ids, then it begins at 0. Never at '$': that would skip what
--          came in between. What was waiting comes again from the log, hence `due` and `note` go.
--          In the order of keys the mark `w` of the lease stands for `low`, and notes stay, since they are of its own events.
--          `start` is resolved once, at birth, and kept with its ordinal ('' where unknown) as "id ordinal".
--          XACK goes first since it may grow nothing: at maxmemory the other writes are refused, but not after it.
--          `entered` is for people: who dies before the first sweep was seen by nobody.
-- Cost     O(groups)
local log, meta, due, note, lease = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local group, owner, start, mode = ARGV[1], ARGV[2], ARGV[3], ARGV[4] or 'queue'

local known = redis.call('HMGET', meta, 'mode:' .. group, 'owner:' .. group, 'start:' .. group, 'low:' .. group)
if known[1] and known[1] ~= mode then return {'MODE', known[1]} end
if known[2] and known[2] ~= owner then return {'OWNER', known[2]} end
redis.call('XACK', log, group, '0-1')

local info = {['last-generated-id'] = '0-0', ['entries-added'] = 0, length = 0}
if redis.call('EXISTS', log) == 1 then
  info = named(redis.call('XINFO', 'STREAM', log))
end
local last, added, length = info['last-generated-id'], info['entries-added'], info.length -- 6.2 knows no entries-added
local first = info['first-entry'] and info['first-entry'][1]

local function ordinal(id) -- how many entries were ever added up to this id; '' where nobody can tell
  if not added or future(id) then return '' end
  if not before(id, last) then return string.format('%.0f', added) end
  if first and before(id, first) then return string.format('%.0f', added - length) end
  return ''
end

local mark = mode == 'log' and redis.call('HMGET', lease, 'w', 'wn') or {}
local from = mark[1] and mark[1] .. ' ' .. mark[2] or mode == 'queue' and known[4] or known[3]
if from then
  local id, count = string.match(from, '^(%S+) (%d*)$')
  local reaches = not before(last, id) and not (added and count ~= '' and added < tonumber(count))
  start = reaches and id or '0-0'
elseif start == '$' then
  start = last
end
local create = {'XGROUP', 'CREATE', log, group, start, 'MKSTREAM'}
local read = from and '' or ordinal(start) -- else its lag, and what it loses, would be unknown until it has read
if read ~= '' then
  create[#create + 1] = 'ENTRIESREAD'
  create[#create + 1] = read
end
local made = redis.pcall(unpack(create))
if made.err and not string.find(made.err, 'BUSYGROUP') then return made end
local born = not made.err
if born and from and mode == 'queue' then redis.call('DEL', due, note) end
if born and not from then redis.call('HSET', meta, 'start:' .. group, start .. ' ' .. ordinal(start)) end
local time = redis.call('TIME')
redis.call('HSET', meta, 'mode:' .. group, mode, 'owner:' .. group, owner,
  'entered:' .. group, string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)))
return {'OK', born and (from and 2 or 1) or 0}
