-- letter.lua: add a dead letter.
-- CALL     letter(dead, group, position, attempts, reason, error, words): `words` are the fields of the event
-- RETURNS  nil | why not: then nothing was written
-- Notes    It is `reason error attempts position group died`, then the fields, up to 3,500 pairs (Lua cannot pass more).
-- Cost     O(bytes); of an event of 200 bytes 12 µs
local letter
do
  local MAX_WORDS = 7000
  local time = redis.call('TIME')
  local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))

  function letter(dead, group, position, attempts, reason, error, words)
    local fields = {'reason', reason, 'error', error, 'attempts', attempts, 'position', position, 'group', group, 'died', now}
    for i = 1, math.min(MAX_WORDS, #words) do fields[#fields + 1] = words[i] end
    local added = redis.pcall('XADD', dead, '*', unpack(fields))
    return type(added) == 'table' and added.err or nil
  end
end
