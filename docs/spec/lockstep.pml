/*
 * The core of Lockstep's write path at small scope, for SPIN.
 *
 * One document; its content is a set of two chunk texts. Clients put {0}, {1} or {0,1} and
 * delete. Workers upsert (insert_only), mark, switch, delete dead points and purge tombstones;
 * reconcile repairs a lost point and sweeps a dead one that came back. The index applies a
 * request at any time after it was sent, in any order and any number of times: a request once
 * sent is never forgotten, which is stronger than any grace period.
 *
 * A slot is an id: (chunk text, incarnation). An id that was purged is never used again,
 * because the purge raises the floor.
 *
 * Invariants (asserted after every step)
 *   P1  what the join shows is the serving version: each of its chunks once, nothing else
 *   P2  without index loss, the whole serving version is found; nothing shown is declared dead
 *   P4  no delete request names a live id; without loss, what is marked indexed is in the index
 *
 * Broken on purpose, each must be rejected:
 *   -DREUSE_IDS     a chunk that returns takes its old id back (no incarnations)
 *   -DEARLY_SWITCH  the version switches before its entries are indexed
 *   -DDEAD_EARLY    entries die when the next version is accepted, not when it serves
 *   -DKEEP_SERVING  a delete leaves serving_version as it was
 *
 * Run: make verify-spec
 */

#ifndef OPS
#define OPS 4       /* client operations */
#endif
#ifndef LOSSES
#define LOSSES 0    /* points the index may lose */
#endif

#define INCS  4     /* incarnations of a chunk text; OPS + 1 suffices for OPS flips up to this bound */
#define SLOTS 8     /* 2 texts x INCS */

#define none 0       /* an id that was never used, or was purged */
mtype = { pending, indexed, dead, tomb };

mtype st[SLOTS];    /* the ledger's row */
byte born[SLOTS];
byte died[SLOTS];   /* 0: not yet */
bool sentUp[SLOTS]; /* requests under way, for ever */
bool sentDel[SLOTS];
bool held[SLOTS];   /* what the index holds */
byte floor[2];      /* lowest incarnation still to be used, by text */

byte content[OPS + 2]; /* content of each version as a bit set */
byte target = 0;        /* target version */
byte serving = 0;        /* serving version, 0: none */
bool deleted = false;
byte ops = OPS;
byte losses = LOSSES;
bool lost = false;  /* the index has lost something at some time */

#define TEXT(s) ((s) / INCS)
#define LIVE(s) (st[s] == pending || st[s] == indexed)
#define SHOWN(s) (serving > 0 && !deleted && LIVE(s) && born[s] <= serving && (died[s] == 0 || serving < died[s]))

/* The slot of text c's row that the target version holds, or SLOTS. */
inline current(c, out) {
  out = SLOTS; k = c * INCS;
  do
  :: k < (c + 1) * INCS ->
     if :: LIVE(k) && died[k] == 0 -> out = k :: else fi; k++
  :: else -> break
  od
}

/* The first free id of text c: above every incarnation used and above the floor. */
inline fresh(c, out) {
#ifdef REUSE_IDS
  out = c * INCS
#else
  out = c * INCS + floor[c]; k = c * INCS;
  do
  :: k < (c + 1) * INCS ->
     if :: st[k] != none && k + 1 > out -> out = k + 1 :: else fi; k++
  :: else -> break
  od
#endif
}

/* Declares dead what can never be shown again. */
inline bury() {
  k = 0;
  do
  :: k < SLOTS ->
     if
#ifdef DEAD_EARLY
     :: LIVE(k) && died[k] > 0 -> st[k] = dead
#else
     :: LIVE(k) && died[k] > 0 && (died[k] <= serving || born[k] > serving) -> st[k] = dead
#endif
     :: else
     fi; k++
  :: else -> break
  od
}

inline put(c0, c1) {
  /* Equal to the target version of a document that is not deleted: nothing to do. */
  if
  :: target > 0 && !deleted && content[target] == (c0 + 2 * c1) -> skip
  :: else ->
     target++; content[target] = c0 + 2 * c1; deleted = false;
     i = 0;
     do
     :: i < 2 ->
        current(i, slot);
        if
        :: ((i == 0 && c0) || (i == 1 && c1)) ->
           if
           :: slot == SLOTS ->
              fresh(i, slot);
              if
              :: slot < (i + 1) * INCS -> st[slot] = pending; born[slot] = target; died[slot] = 0
              :: else -> exhausted = true /* out of the model's bound: this branch ends */
              fi
           :: else
           fi
        :: else ->
           if :: slot < SLOTS -> died[slot] = target :: else fi
        fi; i++
     :: else -> break
     od;
     bury()
  fi
}

inline check() {
  c = 0;
  do
  :: c < 2 ->
     n = 0; k = c * INCS;
     do
     :: k < (c + 1) * INCS ->
        if :: SHOWN(k) && held[k] -> n++ :: else fi; k++
     :: else -> break
     od;
     assert(n <= 1);                                               /* P1: each once */
     assert(n == 0 || (serving > 0 && ((content[serving] >> c) & 1)));       /* P1: nothing else */
     assert(lost || serving == 0 || deleted || n == ((content[serving] >> c) & 1)); /* P2: whole */
     c++
  :: else -> break
  od;
  assert(!deleted || serving == 0);                                     /* P2: a delete hides at once */
  k = 0;
  do
  :: k < SLOTS ->
     assert(!(sentDel[k] && LIVE(k)));                             /* P4 */
     assert(!(st[k] == indexed && !held[k] && !lost));             /* P4 */
     k++
  :: else -> break
  od
}

active proctype world() {
  byte s, i, k, c, n, slot; bool all; bool exhausted = false;
  do
  :: exhausted -> break
  :: atomic { !exhausted && ops > 0 ->
       ops--;
       if
       :: skip -> put(1, 0)
       :: skip -> put(0, 1)
       :: skip -> put(1, 1)
       :: target > 0 && !deleted ->                                    /* delete takes a version */
          target++; content[target] = 0; deleted = true;
#ifndef KEEP_SERVING
          serving = 0;
#endif
          k = 0;
          do
          :: k < SLOTS ->
             if :: LIVE(k) -> st[k] = dead; if :: died[k] == 0 -> died[k] = target :: else fi
             :: else fi; k++
          :: else -> break
          od
       fi;
       if :: !exhausted -> check() :: else fi }
  :: atomic { !exhausted ->
       s = 0;
       do :: s < SLOTS - 1 -> s++ :: break od;                     /* any slot */
       if
       :: st[s] == pending && !sentUp[s] -> sentUp[s] = true       /* a worker sends the upsert */
       :: sentUp[s] && !held[s] -> held[s] = true                  /* it lands, perhaps again */
       :: st[s] == pending && held[s] -> st[s] = indexed           /* read back and marked */
       :: st[s] == dead && !sentDel[s] -> sentDel[s] = true        /* a dead point is deleted by id */
       :: sentDel[s] && held[s] -> held[s] = false                 /* it lands, perhaps again */
       :: st[s] == dead && !held[s] -> st[s] = tomb                /* read absent */
       :: st[s] == tomb && !held[s] ->                             /* read absent once more: purged */
          if :: floor[TEXT(s)] < (s % INCS) + 1 -> floor[TEXT(s)] = (s % INCS) + 1 :: else fi;
          st[s] = none; born[s] = 0; died[s] = 0
       :: st[s] == tomb && held[s] -> st[s] = dead                 /* a late upsert: swept again */
       :: st[s] == indexed && !held[s] -> st[s] = pending          /* reconcile: missing */
       :: losses > 0 && held[s] -> losses--; lost = true; held[s] = false
       :: else -> skip
       fi;
       check() }
  :: atomic { !exhausted && target > 0 && !deleted && serving != target ->      /* switch, under the row lock */
       all = true; k = 0;
       do
       :: k < SLOTS ->
          if :: st[k] == pending && died[k] == 0 -> all = false :: else fi; k++
       :: else -> break
       od;
#ifdef EARLY_SWITCH
       all = true;
#endif
       if :: all -> serving = target; bury() :: else -> skip fi;
       check() }
  od
}
