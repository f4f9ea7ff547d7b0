-- commit.lua: store the progress of one partition with all that follows from it, but only while it is ours.
-- USES     store outputs letter
-- KEYS     log, lease, parked, parkinfo, note, dead, then the lists of the event keys that the effects name, then those of
--          the targets of outputs, see `store`
-- ARGV     group, member, epoch, seq, w, wn, h, open, done, retried, partition, max dead letters,
--          ids whose notes go ('' or with blanks between), effects and outputs (each '' or MessagePack), blobs. Outputs are
--          in the order of their events, see `publish`; each effect is one of
--            [park,  list, key, which blob, due, attempts, postponed, error]
--            [delay, list, key, id, due, attempts, postponed, error, of a pack what is left of it: `0,3`]
--            [pop,   list, key, id]
--            [dead,  id, reason, error, attempts, first blob, how many blobs: its fields]; of an event of a pack `1693-0.17`
-- RETURNS  {OK, events parked, key, …}: of its pops, the keys of which nothing is parked any more
--          | {LOST} | {SEQ}: not the commit that follows | {GONE}: no such log or group | {FULL} | {DEAD_FULL}
--          | {TYPE, key of another kind} | {REFUSED, why the outputs cannot be stored, which of them}
--          In all these cases nothing is written
-- Why      An owner that was taken over must not overwrite what its successor stored: owner and epoch are compared first.
--          A repeat shows the same `seq` and changes nothing, so the same commit is sent until it is answered.
--          A script is not a transaction: outputs and dead letters are added before all else, so that maxmemory refuses
--          them with nothing done. PERSIST may grow nothing and opens the door for what maxmemory would refuse as a first write.
--          A dead letter is the entry as it was written; ours where it was trimmed away, and where it is an event of a pack.
--          Where the group is gone nothing is known any more about its log either: `acquire` decides where to go on.
-- Cost     O(effects + outputs); 200 events without one: two writes, about 300 bytes of the append-only file
local log, lease, parked, parkinfo, note, dead = unpack(KEYS, 1, 6)
local group, me, epoch, seq, w, wn, h, open = unpack(ARGV, 1, 8)
local done, retried, partition, max_dead, cleared = unpack(ARGV, 9, 13)
local effects = ARGV[14] == '' and {} or cmsgpack.unpack(ARGV[14])
local outputs = ARGV[15] == '' and {} or cmsgpack.unpack(ARGV[15])
local BLOBS = 15

local function answer()
  local reply = {'OK', tonumber(redis.call('HGET', parkinfo, '#n') or 0)}
  for _, effect in ipairs(effects) do
    if effect[1] == 'pop' and redis.call('EXISTS', KEYS[effect[2]]) == 0 then reply[#reply + 1] = effect[3] end
  end
  return reply
end

local known = redis.call('HMGET', lease, 'owner', 'epoch', 'seq', 'h', 'done', 'retried')
if known[1] ~= me or known[2] ~= epoch then return {'LOST'} end
if known[3] == seq then return answer() end
if tonumber(seq) ~= known[3] + 1 then return {'SEQ'} end
local group_there = redis.pcall('XPENDING', log, group, '-', '+', 1)
if group_there.err then
  return string.find(group_there.err, 'NOGROUP') and {'GONE'} or group_there
end
local deaths = 0
if #effects + #outputs > 0 then
  local kinds = {'stream', 'hash', 'zset', 'hash', 'hash', 'stream'}
  for i = 1, #outputs > 0 and outputs[1][1] - 1 or #KEYS do
    local found = redis.call('TYPE', KEYS[i]).ok
    if found ~= 'none' and found ~= (kinds[i] or 'list') then return {'TYPE', KEYS[i]} end
  end
  for _, effect in ipairs(effects) do deaths = deaths + (effect[1] == 'dead' and 1 or 0) end
  if deaths > 0 and redis.call('XLEN', dead) + deaths > tonumber(max_dead) then return {'DEAD_FULL'} end
end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))

local function bury(id, reason, error, attempts, first, count)
  local alone = string.find(id, '.', 1, true)
  local entry = not alone and redis.call('XRANGE', log, id, id)[1]
  local words = entry and entry[2] or {unpack(ARGV, BLOBS + first, BLOBS + first + count - 1)}
  return letter(dead, group, partition .. '@' .. id, attempts, reason, error, words)
end

local refused, which = publish(outputs, BLOBS)
if refused then return {'REFUSED', refused, which} end
for _, effect in ipairs(effects) do
  if effect[1] == 'dead' then
    local why = bury(unpack(effect, 2))
    if why then return string.find(why, 'OOM') and {'FULL'} or {err = why} end
  end
end
redis.call('PERSIST', lease)

local more = 0
local function is_head(list, id)
  local head = redis.call('LINDEX', KEYS[list], 0)
  return head and string.match(head, '^%S+') == id
end
local function since(key)
  return string.match(redis.call('HGET', parkinfo, '=' .. key) or '', '^%d+ %d+ (%d+)') or now
end
local function tell(key, attempts, postponed, from, error)
  redis.call('HSET', parkinfo, '=' .. key, attempts .. ' ' .. postponed .. ' ' .. from .. ' ' .. error)
end

local apply = {dead = function() end}
function apply.park(list, key, blob, due, attempts, postponed, error)
  redis.call('RPUSH', KEYS[list], ARGV[BLOBS + blob])
  if redis.call('ZADD', parked, 'NX', due, key) == 1 then tell(key, attempts, postponed, now, error) end
  more = more + 1
end
local function leave(list, id, left)
  local front, head = id .. ' ' .. left .. ' ', redis.call('LINDEX', KEYS[list], 0)
  local _, last = string.find(head, '^%S+ [%d,]* ?')
  if string.sub(head, 1, last) ~= front then redis.call('LSET', KEYS[list], 0, front .. string.sub(head, last + 1)) end
end
function apply.delay(list, key, id, due, attempts, postponed, error, left)
  if not is_head(list, id) then return end
  if left then leave(list, id, left) end
  redis.call('ZADD', parked, due, key)
  tell(key, attempts, postponed, since(key), error)
  redis.call('HDEL', note, id)
end
function apply.pop(list, key, id)
  if not is_head(list, id) then return end
  redis.call('LPOP', KEYS[list])
  redis.call('HDEL', note, id)
  more = more - 1
  if redis.call('EXISTS', KEYS[list]) == 0 then
    redis.call('ZREM', parked, key)
    redis.call('HDEL', parkinfo, '=' .. key)
  else
    redis.call('ZADD', parked, 0, key)
    tell(key, 0, 0, since(key), '')
  end
end
for _, effect in ipairs(effects) do apply[effect[1]](unpack(effect, 2)) end
if more ~= 0 then redis.call('HINCRBY', parkinfo, '#n', more) end
for id in string.gmatch(cleared, '%S+') do redis.call('HDEL', note, id) end

local marks = {'seq', seq, 'w', w, 'wn', wn}
local function mark(name, value)
  marks[#marks + 1] = name
  marks[#marks + 1] = value
end
if h ~= '' or known[4] ~= '' then mark('h', h) mark('open', open) end
if done ~= '0' then mark('done', string.format('%.0f', (known[5] or 0) + done)) end
if retried ~= '0' then mark('retried', string.format('%.0f', (known[6] or 0) + retried)) end
redis.call('HSET', lease, unpack(marks))
redis.call('XGROUP', 'SETID', log, group, w, unpack(wn ~= '' and {'ENTRIESREAD', wn} or {}))
return answer()
