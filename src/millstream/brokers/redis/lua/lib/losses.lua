-- losses.lua: count what a group had not settled and what is gone from the log, each event once.
-- USES     ids, before it
-- CALL     losses(group, log, meta, due, note, stats, lease, limit)
-- RETURNS  how many are newly lost; nothing where the log or the group is gone
-- Why      XTRIM leaves no trace but the numbers. A log counts the entries that were ever added, so those before its first
--          one are told by `entries-added` less its length, and a group counts what it has read. Whoever is found to have
--          missed some is mended at once with SETID ENTRIESREAD: it is not counted again, and its lag is right again.
--          Read on behind a gap, Redis 7.0 counts only what it hands out: once the group is at the end, the difference
--          to `entries-added` is what it missed. Later servers (8.2 does) count anew from the first entry then, and forget
--          what was missed: there it must be counted before the group reads on, or by who read on, see passed.lua.
--          In the order of keys the mark of the lease is what counts, and `gaps` what its owner has counted already behind
--          it; while there is an owner, nobody else knows what it has read.
--          Of what was delivered only that counts which waits: what a living consumer holds it has in memory.
--          A group that begins at a time to come passes events over, and loses none.
-- Cost     O(groups + limit), and two bodies in XINFO STREAM
local losses
do
  local function about(group, log)
    if redis.call('EXISTS', log) == 0 then return end
    for _, info in ipairs(redis.call('XINFO', 'GROUPS', log)) do
      local fields = named(info)
      if fields.name == group then return named(redis.call('XINFO', 'STREAM', log)), fields end
    end
  end

  local function missed(stream, mark, read)
    local last, added = stream['last-generated-id'], stream['entries-added'] -- 6.2 counts nothing
    local first = stream['first-entry'] and stream['first-entry'][1]
    if not added or not read or before(last, mark) then return 0 end
    if not first or before(mark, first) then return math.max(0, added - stream.length - read) end
    return mark == last and math.max(0, added - read) or 0
  end

  local function of_lease(group, log, lease, stream)
    local known = redis.call('HMGET', lease, 'owner', 'w', 'wn', 'gaps')
    if known[1] and known[1] ~= '' then return 0 end
    local w, read = known[2], tonumber(known[3] or nil)
    local lost = missed(stream, w, read)
    if lost == 0 then return 0 end
    local told = 0
    for offset, from, to in string.gmatch(known[4] or '', '(%S+):(%d+):(%d+)') do
      if before(w, offset) then told = told + to - from end
    end
    redis.call('HSET', lease, 'wn', string.format('%.0f', read + lost), 'gaps', '')
    redis.call('XGROUP', 'SETID', log, group, w, 'ENTRIESREAD', string.format('%.0f', read + lost))
    return math.max(0, lost - told)
  end

  local function of_group(group, log, stream, at)
    local mark, read = at['last-delivered-id'], at['entries-read']
    local lost = missed(stream, mark, read)
    if lost > 0 then
      redis.call('XACK', log, group, '0-1') -- may grow nothing: at maxmemory what follows is refused, but not after it
      redis.call('XGROUP', 'SETID', log, group, mark, 'ENTRIESREAD', string.format('%.0f', read + lost))
    end
    return lost
  end

  local function of_waiting(group, log, due, note, stream, limit)
    local first = stream['first-entry'] and '(' .. stream['first-entry'][1] or '+'
    local gone = redis.call('XPENDING', log, group, '-', first, limit, '~due')
    for _, entry in ipairs(gone) do
      redis.call('XACK', log, group, entry[1])
      redis.call('ZREM', due, entry[1])
      redis.call('HDEL', note, entry[1], '+' .. entry[1], '*' .. entry[1])
    end
    return #gone
  end

  function losses(group, log, meta, due, note, stats, lease, limit)
    local stream, at = about(group, log)
    if not at then return end
    local ordered = redis.call('HGET', meta, 'mode:' .. group) == 'log'
    local leased = ordered and redis.call('HGET', lease, 'w')
    local lost = leased and of_lease(group, log, lease, stream) or not leased and of_group(group, log, stream, at) or 0
    if not ordered then lost = lost + of_waiting(group, log, due, note, stream, limit) end
    if lost > 0 then redis.call('HINCRBY', stats, 'lost', lost) end
    return lost
  end
end
