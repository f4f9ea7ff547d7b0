-- trim.lua: one step of retention in one partition: find what is still needed, remove of the rest what may go, count losses.
-- USES     ids losses
-- KEYS     log, meta; then due, note, dead, stats, lease of each group
-- ARGV     age in ms; how many events may stay, or ''; keep: 1 or 0; forget ms, or 0: never; most to remove in one call; most
--          bodies to look at; `full_at`, or ''; then four per group: name; when it was last seen, in ms; of its dead letters
--          that of the last one looked at, or '', and the id of the first event that one of these needs, or ''
-- RETURNS  {OK, removed, length, pin, by whom, {group, newly lost, …}, {group, when it will keep nothing, …}, {who keeps nothing
--          any more, …}} | {AGAIN}: other groups, or many more dead letters, than those given | {NONE}: no such log
--          pin: the id behind which something that might go is kept, or ''
-- Why      Between a look at the groups and a trim a group may be made, or moved back: so both are one step.
--          XTRIM ~ removes whole nodes only, which costs next to nothing, and its LIMIT is the most that it removes. So MINID
--          at the pin, with as many as are too many for its LIMIT, removes the oldest, no more than asked, and nothing that
--          is needed. Up to a node stays beyond what was asked for. No XDEL: after it no number of Redis is exact any more.
--          A group keeps what lies behind its oldest pending entry, or its last delivered one; in the order of keys what lies
--          behind the mark of its lease, or behind its id where a person moved that back, see acquire.lua: parked events and
--          dead letters are copies there. Else a dead letter needs its event to be replayed. Those that came since they
--          were looked at are looked at here.
--          Losses are told once: `told:g` is what has been, whoever counted them. A group of another client has no owner, and
--          `entered:g` is when it was first found.
--          A group is announced before it keeps nothing: `announced:g` is when it was first found silent for half of forget,
--          and the other half begins then at the earliest. Else who comes first after a standstill of everything, or after the
--          clock was put forward, would cost the others their events. What was noted in an earlier silence does not count.
-- Cost     O(groups + consumers of foreign groups + removed / 100), and some bodies
local log, meta = KEYS[1], KEYS[2]
local age, stay, keep, forget, most, bodies, full_at = unpack(ARGV, 1, 7)
local MAX_LETTERS, MAX_WAITING = 100, 1000
age, forget, most, bodies = tonumber(age), tonumber(forget), tonumber(most), tonumber(bodies)

if redis.call('EXISTS', log) == 0 then return {'NONE'} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function whole(number) return string.format('%.0f', number) end

local given, found = {}, {}
for i = 8, #ARGV, 4 do given[ARGV[i]] = true end
for _, info in ipairs(redis.call('XINFO', 'GROUPS', log)) do
  local fields = named(info)
  found[fields.name] = fields
  if not given[fields.name] then return {'AGAIN'} end
end
redis.call('PERSIST', log)

local function last_seen(group, seen)
  local known = redis.call('HMGET', meta, 'seen:' .. group, 'entered:' .. group, 'owner:' .. group)
  seen = math.max(seen, tonumber(known[1] or 0), tonumber(known[2] or 0))
  if known[3] and seen > 0 or not found[group] then return seen end
  if not known[2] then redis.call('HSET', meta, 'entered:' .. group, whole(now)) end
  if not known[2] then return now end
  for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', log, group)) do seen = math.max(seen, now - named(info).idle) end
  return seen
end

local function ending(group, seen) -- when it will keep nothing any more; nil unless it is announced
  local field = 'announced:' .. group
  local at = tonumber(redis.call('HGET', meta, field) or '')
  if forget == 0 or now - seen < forget / 2 then
    if at then redis.call('HDEL', meta, field) end
    return nil
  end
  if not at or at - seen < forget / 2 then
    at = now
    redis.call('HSET', meta, field, whole(at))
  end
  return math.max(seen + forget, at + forget / 2)
end

local function settled(group, lease) -- all up to this id is; and does the group need the events of its dead letters?
  local at = found[group]
  if redis.call('HGET', meta, 'mode:' .. group) == 'log' then
    local w, mirror = redis.call('HGET', lease, 'w'), at and at['last-delivered-id']
    if w and mirror and before(mirror, w) then return mirror end
    if w or mirror then return w or mirror end
  end
  local oldest = at and redis.call('XPENDING', log, group, '-', '+', 1)[1]
  if at then return oldest and predecessor(oldest[1]) or at['last-delivered-id'], true end
  local known = redis.call('HMGET', meta, 'low:' .. group, 'start:' .. group)
  return string.match(known[1] or known[2] or '', '^(%d+%-%d+)') or '0-0', true
end

local function needed(dead, last, first) -- the first event that a dead letter needs; nil where there is none
  local newer = redis.call('XRANGE', dead, last == '' and '-' or '(' .. last, '+', 'COUNT', MAX_LETTERS)
  if #newer == MAX_LETTERS then return nil, true end
  for _, letter in ipairs(newer) do
    local id = string.match(named(letter[2]).position or '', '@(%d+%-%d+)')
    if id and (first == '' or before(id, first)) and #redis.call('XRANGE', log, id, id) > 0 then first = id end
  end
  return first ~= '' and first or nil
end

local pin, by = nil, ''
local function hold(id, name)
  if not pin or before(id, pin) then pin, by = id, name end
end

local keeps = keep == '1' and (age > 0 or stay ~= '' or forget > 0)
local fading, forgotten = {}, {}
local last = named(redis.call('XINFO', 'STREAM', log))['last-generated-id']
for i = 8, #ARGV, 4 do
  local group, key = ARGV[i], 3 + 5 * (i - 8) / 4
  local ends = ending(group, keeps and last_seen(group, tonumber(ARGV[i + 1])) or now)
  if ends and ends <= now then
    forgotten[#forgotten + 1] = group
  elseif keeps then
    local low, replays = settled(group, KEYS[key + 4])
    local dead, first, many = KEYS[key + 2], nil, nil
    if replays and redis.call('EXISTS', dead) == 1 then first, many = needed(dead, ARGV[i + 2], ARGV[i + 3]) end
    if many then return {'AGAIN'} end
    hold(low, group)
    if first then hold(predecessor(first), 'dead letters of ' .. group) end
    if ends and (first or before(low, last)) then
      fading[#fading + 1] = group
      fading[#fading + 1] = whole(ends)
    end
  end
end

local removed = 0
local edge = pin and successor(pin)
local cut = age > 0 and whole(math.max(0, now - age)) .. '-0'
if cut then
  removed = redis.call('XTRIM', log, 'MINID', '~', edge and before(edge, cut) and edge or cut, 'LIMIT', most)
end
local excess = stay ~= '' and redis.call('XLEN', log) - stay or 0
if excess > 0 and removed < most then
  local limit = math.min(excess, most - removed)
  if edge then
    removed = removed + redis.call('XTRIM', log, 'MINID', '~', edge, 'LIMIT', limit)
  else
    removed = removed + redis.call('XTRIM', log, 'MAXLEN', '~', stay, 'LIMIT', limit)
  end
  excess = redis.call('XLEN', log) - stay
end
if removed > 0 then redis.call('HINCRBY', meta, 'trimmed', removed) end

local kept = edge and cut and before(edge, cut) and #redis.call('XRANGE', log, edge, '(' .. cut, 'COUNT', 1) > 0
if edge and excess > 0 and not kept then -- are there fewer that nobody needs than there are too many?
  local few = math.min(excess, bodies)
  kept = #redis.call('XRANGE', log, '-', pin, 'COUNT', few) < few
end

local lost = {}
for i = 8, #ARGV, 4 do
  local group, key = ARGV[i], 3 + 5 * (i - 8) / 4
  local due, note, _, stats, lease = unpack(KEYS, key, key + 4)
  losses(group, log, meta, due, note, stats, lease, MAX_WAITING)
  local all = tonumber(redis.call('HGET', stats, 'lost') or 0)
  local told = tonumber(redis.call('HGET', meta, 'told:' .. group) or 0)
  if all ~= told then redis.call('HSET', meta, 'told:' .. group, whole(all)) end
  if all > told then
    lost[#lost + 1] = group
    lost[#lost + 1] = all - told
  end
end
if full_at == '' then redis.call('HDEL', meta, 'full_at') else redis.call('HSET', meta, 'full_at', full_at) end
return {'OK', removed, redis.call('XLEN', log), kept and pin or '', kept and by or '', lost, fading, forgotten}
