-- What schema version 2 adds: groups that consume in the order of keys. A new file gets it right behind `schema.sql`, one
-- of version 1 when it is opened.

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
