-- sweep.lua: look after one partition of a group; one process does it, every few seconds.
-- USES     ids losses
-- KEYS     log, meta, due, note, stats, lease
-- ARGV     group; cursor: '-' to begin with; at most this often, in ms; limit
-- RETURNS  {OK, how many were missing in `due`, next cursor or '', how many events are newly lost, consumer, …}
--          | {RECENT}: somebody else did it just now | {NOGROUP}
-- Why      `low` is where the group may be made again when it vanishes: behind it lies all that is not settled. It is
--          kept as "id ordinal" with the number of entries read, by which a log that was made anew is told from the old.
--          Entries of `~due` that are not in `due` (a foreign client moved or removed something) would wait for ever.
--          What is gone is looked for before the group reads on, see losses.lua.
--          The time `seen` is the server's: it only keeps two processes from doing the same work.
-- Cost     O(consumers + limit)
local log, meta, due, note, stats, lease = unpack(KEYS)
local group, cursor, often, limit = unpack(ARGV)

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local seen = tonumber(redis.call('HGET', meta, 'seen:' .. group) or 0)
if cursor == '-' and now >= seen and now - seen < tonumber(often) then return {'RECENT'} end

local groups = redis.pcall('XINFO', 'GROUPS', log)
if groups.err then return {'NOGROUP'} end
local ours
for _, info in ipairs(groups) do
  local fields = named(info)
  if fields.name == group then ours = fields end
end
if not ours then return {'NOGROUP'} end

redis.call('XACK', log, group, '0-1')
local lost = losses(group, log, meta, due, note, stats, lease, limit)
local oldest = redis.call('XPENDING', log, group, '-', '+', 1)[1]
local low = oldest and predecessor(oldest[1]) or ours['last-delivered-id']
redis.call('HSET', meta, 'low:' .. group, low .. ' ' .. string.format('%.0f', ours['entries-read'] or 0),
  'seen:' .. group, string.format('%.0f', now))

local answer, waiting = {'OK', 0, '', lost}, 0
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', log, group)) do
  local fields = named(info)
  if fields.name == '~due' then waiting = fields.pending else answer[#answer + 1] = fields.name end
end
if waiting > redis.call('ZCARD', due) then
  local page = redis.call('XPENDING', log, group, cursor, '+', limit, '~due')
  for _, entry in ipairs(page) do answer[2] = answer[2] + redis.call('ZADD', due, 'NX', 0, entry[1]) end
  if #page == tonumber(limit) then answer[3] = '(' .. page[#page][1] end
end
return answer
