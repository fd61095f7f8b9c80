/*
Writes token shards in llm.c's format: PREFIX_train_000000.bin, PREFIX_val_000000.bin, ... dataloader.h reads
them.

A header of 256 little-endian int32, then the tokens. header[0], header[1]: 20240520, 1 for uint16 tokens,
20240801, 7 for uint32 tokens; header[2]: the number of tokens; header[3]: vocabulary size; header[4]:
tokenizer_hash(). llm.c's own shards have 0 in the last two.

    char scratch[PATH_MAX];
    ShardSet set;
    shard_scratch_begin(scratch, "data/text");
    shard_set_begin(&set, scratch, "data/text", tokenizer_vocab_size(t), tokenizer_hash(t), 100000000);
    shard_set_write(&set, SHARD_TRAIN, ids, count);
    shard_sets_publish(&set, 1, NULL, NULL);

All shards are written in one scratch directory beside their destination, and moved together at the end. Until
then the shards of an earlier run do not change. Several sets may share the scratch directory.
*/
#ifndef TOKENIZER_SHARDS_H
#define TOKENIZER_SHARDS_H

#include "runtime/checks.h" // fail, scratch_path_begin

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "shards are little-endian, and are written as they are in memory"
#endif

enum { SHARD_HEADER_INTS = 256, SHARD_TRAIN = 0, SHARD_VALIDATION = 1, SHARD_SPLITS = 2 };

static inline const char* shard_split_name(int split) { return split == SHARD_TRAIN ? "train" : "val"; }

typedef struct {
    char prefix[PATH_MAX];  // DIRECTORY/NAME
    const char* name;       // the NAME in it
    char scratch[PATH_MAX]; // a directory
    int32_t vocab_size;
    uint32_t tokenizer_hash;
    int64_t shard_tokens; // upper bound of the tokens in one shard
    FILE* files[SHARD_SPLITS];
    int64_t in_shard[SHARD_SPLITS]; // tokens written to the open file
    int counts[SHARD_SPLITS];       // number of files begun
    int64_t tokens[SHARD_SPLITS];   // in all files
} ShardSet;

static inline int shard_token_bytes(const ShardSet* set) { return set->vocab_size <= 65536 ? 2 : 4; }

static inline void shard_path(char* path, const ShardSet* set, int published, int split, int index) {
    if (published) path_format(path, "%s_%s_%06d.bin", set->prefix, shard_split_name(split), index);
    else path_format(path, "%s/%s_%s_%06d.bin", set->scratch, set->name, shard_split_name(split), index);
}

// Makes the scratch directory, and the directories above it.
static inline void shard_scratch_begin(char* scratch, const char* prefix) {
    path_format(scratch, "%s.%d.partial", prefix, (int)getpid());
    make_parent_or_fail(prefix);
    scratch_path_begin(scratch);
    scratch_make_directory_or_fail(scratch);
}

static inline void shard_set_begin(ShardSet* set, const char* scratch, const char* prefix, int32_t vocab_size,
                                   uint32_t tokenizer_hash, int64_t shard_tokens) {
    memset(set, 0, sizeof(*set));
    path_format(set->prefix, "%s", prefix);
    path_format(set->scratch, "%s", scratch);
    const char* slash = strrchr(set->prefix, '/');
    set->name = slash ? slash + 1 : set->prefix;
    set->vocab_size = vocab_size;
    set->tokenizer_hash = tokenizer_hash;
    set->shard_tokens = shard_tokens;
}

static inline void shard_write_header(const ShardSet* set, int split, const char* path) {
    int32_t header[SHARD_HEADER_INTS] = {0};
    int wide = shard_token_bytes(set) == 4;
    header[0] = wide ? 20240801 : 20240520;
    header[1] = wide ? 7 : 1;
    header[2] = (int32_t)set->in_shard[split];
    header[3] = set->vocab_size;
    header[4] = (int32_t)set->tokenizer_hash;
    // Not rewind(), which would clear an error of the tokens written so far.
    if (fseeko(set->files[split], 0, SEEK_SET) != 0) fail("%s: cannot write: %s", path, strerror(errno));
    write_or_fail(header, sizeof(header), set->files[split], path);
}

static inline void shard_open(ShardSet* set, int split) {
    char path[PATH_MAX];
    shard_path(path, set, 0, split, set->counts[split]++);
    set->files[split] = scratch_open_or_fail(path);
    set->in_shard[split] = 0;
    shard_write_header(set, split, path);
}

static inline void shard_close(ShardSet* set, int split) {
    char path[PATH_MAX];
    if (!set->files[split]) return;
    shard_path(path, set, 0, split, set->counts[split] - 1);
    shard_write_header(set, split, path); // again, now with the number of tokens
    close_written_or_fail(set->files[split], path);
    set->files[split] = NULL;
}

// Writes tokens to the open shard, in the shard's width.
static inline void shard_write_tokens(ShardSet* set, int split, const int32_t* ids, size_t count) {
    char path[PATH_MAX];
    uint16_t narrow[4096];
    shard_path(path, set, 0, split, set->counts[split] - 1);
    set->in_shard[split] += (int64_t)count;
    set->tokens[split] += (int64_t)count;
    if (shard_token_bytes(set) == 4) {
        write_or_fail(ids, count * sizeof(int32_t), set->files[split], path);
        return;
    }
    while (count > 0) {
        size_t part = count < 4096 ? count : 4096;
        for (size_t i = 0; i < part; i++) narrow[i] = (uint16_t)ids[i];
        write_or_fail(narrow, part * sizeof(uint16_t), set->files[split], path);
        ids += part;
        count -= part;
    }
}

static inline void shard_set_write(ShardSet* set, int split, const int32_t* ids, size_t count) {
    while (count > 0) {
        if (set->files[split] && set->in_shard[split] == set->shard_tokens) shard_close(set, split);
        if (!set->files[split]) shard_open(set, split);
        int64_t room = set->shard_tokens - set->in_shard[split];
        size_t part = (int64_t)count < room ? count : (size_t)room;
        shard_write_tokens(set, split, ids, part);
        ids += part;
        count -= part;
    }
}

// Closes the shards, and fails if a directory has one of their names.
static inline void shard_set_finish(ShardSet* set) {
    char path[PATH_MAX];
    struct stat info;
    for (int split = 0; split < SHARD_SPLITS; split++) {
        shard_close(set, split);
        for (int index = 0; index <= set->counts[split]; index++) {
            shard_path(path, set, 1, split, index);
            if (index < set->counts[split] && stat(path, &info) == 0 && S_ISDIR(info.st_mode))
                fail("%s: is a directory, not a file", path);
        }
    }
}

// Moves the shards to their final names. Removes the shards of an earlier, larger set under the
// following names: a pattern such as NAME_train_*.bin would read them too. Returns 0 if a
// rename fails, with its target in `to`; else 1.
static inline int shard_set_rename(const ShardSet* set, char* to) {
    char from[PATH_MAX];
    for (int split = 0; split < SHARD_SPLITS; split++) {
        int index = 0;
        for (; index < set->counts[split]; index++) {
            shard_path(from, set, 0, split, index);
            shard_path(to, set, 1, split, index);
            if (rename(from, to) != 0) return 0;
        }
        do shard_path(to, set, 1, split, index++);
        while (unlink(to) == 0);
    }
    return 1;
}

// Moves all sets to their final names, and then `index`, a file in the scratch directory, to index_path
// (NULL: no index). It removes the index of an earlier run first, so that an index is never beside the shards
// of another run. It holds the scratch lock, so a signal ends the program only before or after.
static inline void shard_sets_publish(ShardSet* sets, int count, const char* index, const char* index_path) {
    char failed[PATH_MAX];
    for (int s = 0; s < count; s++) shard_set_finish(&sets[s]);
    int renamed = 1;
    scratch_lock();
    if (index) (void)unlink(index_path);
    for (int s = 0; s < count && renamed; s++) renamed = shard_set_rename(&sets[s], failed);
    if (renamed && index) {
        path_format(failed, "%s", index_path);
        renamed = rename(index, index_path) == 0;
    }
    const int reason = errno;
    scratch_unlock();
    if (!renamed) fail("%s: cannot rename to it: %s", failed, strerror(reason));
    scratch_path_remove();
}

#endif
