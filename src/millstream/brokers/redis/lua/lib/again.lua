-- again.lua: let an event that was delivered wait once more, under `~due`, attempts counted anew. An event of a pack may come
--          with others that are left of it.
-- CALL     entry_of(id): the entry's id, and of an event of a pack its number: `1693-0.17` is '1693-0', '17'
--          anew(log, group, due, note, id, part): what waits no more, or waits; with `part` this event of it alone
--          rejoin(log, group, due, note, id, part, waits): an event of a pack that is pending; `waits`: under `~due`
-- RETURNS  rejoin: true | false: it comes anyway
-- Why      FORCE makes a pending entry where there is none. A pack has one, whatever is left of it: what comes back joins
--          that, and is marked where somebody is at work on the others, see parts.lua.
--          The first write is one that maxmemory refuses: a caller that opened no door has done nothing then.
-- Cost     O(log waiting + bytes of the numbers)
local function entry_of(id)
  local entry, part = string.match(id, '^(%d+%-%d+)%.?(%d*)$')
  return entry, part ~= '' and part or nil
end

local function anew(log, group, due, note, id, part)
  redis.call('ZADD', due, 0, id)
  redis.call('XCLAIM', log, group, '~due', 0, id, 'RETRYCOUNT', 0, 'FORCE', 'JUSTID')
  redis.call('HDEL', note, id, '+' .. id, '*' .. id)
  if part then redis.call('HSET', note, '*' .. id, part) end
end

local function rejoin(log, group, due, note, id, part, waits)
  local left = redis.call('HGET', note, '*' .. id)
  if not left then return false end
  for known in string.gmatch(left, '%d+') do
    if known == part then return false end
  end
  if waits then anew(log, group, due, note, id, left .. ',' .. part)
  else redis.call('HSET', note, '*' .. id, left .. ',+' .. part) end
  return true
end
