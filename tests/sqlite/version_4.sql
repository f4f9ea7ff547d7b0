-- A Millstream file in schema version 4, as it was created then: kept as it is, to try what opens it now.
--
-- log = stream.id * 1024 + partition;  row = log << 40 | sequence number.  One integer is therefore the place of an event
-- in the file, its order within its partition, and what all other tables call it. Nothing here is ever scanned.

CREATE TABLE stream (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    name       TEXT NOT NULL UNIQUE,               -- `namespace:name` in a namespace
    partitions INTEGER NOT NULL,
    key        TEXT NOT NULL,
    codec      TEXT NOT NULL
);

CREATE TABLE log (                                 -- the end of each partition
    id      INTEGER PRIMARY KEY,
    last    INTEGER NOT NULL DEFAULT 0,            -- sequence number of its last event; also how many were ever added
    last_ms INTEGER NOT NULL DEFAULT 0,            -- when that was stored; never goes back, so that it can be searched
    bytes   INTEGER NOT NULL DEFAULT 0             -- data and headers
);

CREATE TABLE event (                               -- never changed: an ordinary rowid table, appended at the end of a log
    row       INTEGER PRIMARY KEY,
    id        TEXT NOT NULL,
    type      TEXT NOT NULL,
    source    TEXT NOT NULL,
    stored_ms INTEGER NOT NULL,
    time_ms   INTEGER,                             -- only where the publisher gave one
    subject   TEXT,
    headers   BLOB,
    data      BLOB NOT NULL
);

CREATE TABLE grp (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    stream   INTEGER NOT NULL,
    name     TEXT NOT NULL,
    owner    TEXT NOT NULL,
    tick     INTEGER NOT NULL DEFAULT 0,           -- beats so far: the clock by which members are judged
    done     INTEGER NOT NULL DEFAULT 0,
    retried  INTEGER NOT NULL DEFAULT 0,
    replayed INTEGER NOT NULL DEFAULT 0,
    dropped  INTEGER NOT NULL DEFAULT 0,
    UNIQUE (stream, name)
);

CREATE TABLE cursor (                              -- how far a group has come in each partition
    grp  INTEGER NOT NULL,
    log  INTEGER NOT NULL,
    seq  INTEGER NOT NULL,                         -- the last one delivered; without a gap settled, in an ordered group
    dead INTEGER NOT NULL DEFAULT 0,               -- dead letters kept now
    PRIMARY KEY (grp, log)
) WITHOUT ROWID;

CREATE TABLE member (                              -- the fence: whoever has no row here settles nothing
    id      INTEGER PRIMARY KEY AUTOINCREMENT,     -- never given twice
    grp     INTEGER NOT NULL,
    name    TEXT NOT NULL,
    nonce   TEXT NOT NULL,
    tick    INTEGER NOT NULL,                      -- the group's at its last beat
    beat_s  REAL NOT NULL,                         -- boot clock of its last beat: shown to people, decides nothing
    lease_s REAL NOT NULL
);
CREATE INDEX member_by_tick ON member (grp, tick);

CREATE TABLE pending (                             -- delivered and not settled
    grp       INTEGER NOT NULL,
    consumer  INTEGER NOT NULL,                    -- the member that holds it; 0 while it waits
    row       INTEGER NOT NULL,
    attempt   INTEGER NOT NULL,
    due_ms    INTEGER,                             -- of a waiting one: when it may be claimed
    suspect   INTEGER NOT NULL DEFAULT 0,          -- as in `Claim.suspect`
    started   INTEGER NOT NULL DEFAULT 0,          -- of a suspect: its handler was started by the present holder
    postponed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (grp, consumer, row)               -- what one consumer holds lies together: settled by one small range
) WITHOUT ROWID;
CREATE INDEX pending_due ON pending (grp, due_ms) WHERE consumer = 0;   -- costs nothing on the healthy path

CREATE TABLE dead (                                -- whole events, so that they outlive what the stream keeps
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    grp       INTEGER NOT NULL,
    row       INTEGER NOT NULL,
    reason    TEXT NOT NULL,
    error     TEXT NOT NULL,
    attempts  INTEGER NOT NULL,
    died_ms   INTEGER NOT NULL,
    event_id  TEXT NOT NULL,
    type      TEXT NOT NULL,
    source    TEXT NOT NULL,
    stored_ms INTEGER NOT NULL,
    time_ms   INTEGER,
    subject   TEXT,
    headers   BLOB,
    data      BLOB NOT NULL
);
CREATE INDEX dead_by_group ON dead (grp, id);

ALTER TABLE grp ADD COLUMN ordered INTEGER NOT NULL DEFAULT 0;   -- 1: in the order of keys; then all up to cursor.seq is settled

CREATE TABLE lease (                               -- of an ordered group: who may work on a partition, and what is settled ahead
    grp     INTEGER NOT NULL,
    log     INTEGER NOT NULL,
    owner   TEXT NOT NULL DEFAULT '',              -- a member's name, never used again; empty while it is free
    epoch   INTEGER NOT NULL DEFAULT 0,            -- grows with every owner
    clean   INTEGER NOT NULL DEFAULT 1,            -- 0 until its owner gives it back
    want    TEXT NOT NULL DEFAULT '',              -- the member that asks for it
    next    TEXT NOT NULL DEFAULT '',              -- the member that it was given back for
    commits INTEGER NOT NULL DEFAULT 0,            -- of this epoch: a repeat is recognised by its number
    h       INTEGER NOT NULL DEFAULT 0,            -- all up to here is settled too, but for `open`; 0: nothing is ahead
    open    TEXT NOT NULL DEFAULT '',              -- sequence numbers, a space in between
    parked  INTEGER NOT NULL DEFAULT 0,            -- events parked now
    PRIMARY KEY (grp, log)
) WITHOUT ROWID;

CREATE TABLE parked_key (                          -- a key that waits, with the figures of its first event
    grp       INTEGER NOT NULL,
    log       INTEGER NOT NULL,
    key       TEXT NOT NULL,                       -- of an event without one: NUL and its sequence number
    due_ms    INTEGER NOT NULL,
    attempts  INTEGER NOT NULL DEFAULT 0,
    postponed INTEGER NOT NULL DEFAULT 0,
    crashes   INTEGER NOT NULL DEFAULT 0,          -- in which it was running
    started   INTEGER NOT NULL DEFAULT 0,          -- its handler was started, and has not come to an end
    error     TEXT NOT NULL DEFAULT '',
    since_ms  INTEGER NOT NULL,
    PRIMARY KEY (grp, log, key)
) WITHOUT ROWID;
CREATE INDEX parked_key_due ON parked_key (grp, log, due_ms);

CREATE TABLE parked (                              -- whole events, so that they outlive what the stream keeps
    id       INTEGER PRIMARY KEY,                  -- their order within a key
    grp      INTEGER NOT NULL,
    log      INTEGER NOT NULL,
    key      TEXT NOT NULL,
    row      INTEGER NOT NULL,
    event_id TEXT NOT NULL,
    type     TEXT NOT NULL,
    source   TEXT NOT NULL,
    time_ms  INTEGER NOT NULL,
    subject  TEXT,
    headers  BLOB,
    data     BLOB NOT NULL
);
CREATE INDEX parked_by_key ON parked (grp, log, key, id);

CREATE TABLE note (                                -- an event that a crash of its owner left behind, and that was started again
    grp     INTEGER NOT NULL,
    row     INTEGER NOT NULL,
    crashes INTEGER NOT NULL DEFAULT 0,            -- in which it was running
    started INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (grp, row)
) WITHOUT ROWID;

ALTER TABLE stream ADD COLUMN policy TEXT;                         -- JSON; NULL: nothing was asked for
ALTER TABLE stream ADD COLUMN repeats INTEGER NOT NULL DEFAULT 0;
ALTER TABLE stream ADD COLUMN trimmed INTEGER NOT NULL DEFAULT 0;  -- events that retention has removed
ALTER TABLE stream ADD COLUMN delayed INTEGER NOT NULL DEFAULT 0;  -- rows in `delayed` now
ALTER TABLE stream ADD COLUMN pinned TEXT NOT NULL DEFAULT '';     -- `Tended.pinned_by` of the last round, for who is refused

ALTER TABLE log ADD COLUMN gone INTEGER NOT NULL DEFAULT 0;        -- all events up to this sequence number are gone
ALTER TABLE log ADD COLUMN ids INTEGER NOT NULL DEFAULT 0;         -- rows in `remembered` now

ALTER TABLE grp ADD COLUMN lost INTEGER NOT NULL DEFAULT 0;
ALTER TABLE grp ADD COLUMN told INTEGER NOT NULL DEFAULT 0;        -- of the lost ones, those that `tend` has told
ALTER TABLE grp ADD COLUMN seen_ms INTEGER NOT NULL DEFAULT 0;     -- when a member beat last, or the group was made
ALTER TABLE grp ADD COLUMN announced_ms INTEGER NOT NULL DEFAULT 0; -- when it was found silent for long; 0: it is not
UPDATE grp SET seen_ms = strftime('%s', 'now') * 1000;             -- nobody wrote it down before: as if born today

ALTER TABLE lease ADD COLUMN skipped INTEGER NOT NULL DEFAULT 0;   -- events of this epoch that its owner found gone

CREATE TABLE remembered (                          -- ids that must not be stored again, of streams that ask for it
    log   INTEGER NOT NULL,
    id    TEXT NOT NULL,
    seq   INTEGER NOT NULL,                        -- of the first event with this id; 0 until it is due
    at_ms INTEGER NOT NULL,
    PRIMARY KEY (log, id)
) WITHOUT ROWID;
CREATE INDEX remembered_by_time ON remembered (log, at_ms);

CREATE TABLE delayed (                             -- whole events that are not due yet
    id       INTEGER PRIMARY KEY,                  -- their order, of those that are due at one time
    log      INTEGER NOT NULL,
    stream   INTEGER NOT NULL,
    due_ms   INTEGER NOT NULL,
    event_id TEXT NOT NULL,
    type     TEXT NOT NULL,
    source   TEXT NOT NULL,
    time_ms  INTEGER NOT NULL,                     -- 0 where the publisher gave none
    subject  TEXT,
    headers  BLOB NOT NULL,
    data     BLOB NOT NULL
);
CREATE INDEX delayed_by_due ON delayed (stream, due_ms);

CREATE TABLE slot (                                -- the last slot of each schedule that publishes to a stream
    stream   INTEGER NOT NULL,
    schedule TEXT NOT NULL,
    at_ms    INTEGER NOT NULL,
    PRIMARY KEY (stream, schedule)
) WITHOUT ROWID;

CREATE INDEX dead_by_row ON dead (grp, row);       -- the oldest one keeps its event, which a replay needs

ALTER TABLE pending ADD COLUMN left TEXT;          -- of a pack: those of its events that are left; NULL: all
ALTER TABLE pending ADD COLUMN given TEXT;         -- those that people gave back meanwhile: left too from the next claim on

ALTER TABLE parked ADD COLUMN left TEXT;
ALTER TABLE parked ADD COLUMN part INTEGER;        -- of an event of a pack, which stands here alone

ALTER TABLE dead ADD COLUMN part INTEGER;
