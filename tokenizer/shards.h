/*
Token shards, written: llm.c's format, PREFIX_train_000000.bin, PREFIX_val_000000.bin, ...

A header of 256 little-endian int32, then the tokens. header[0], header[1]: 20240520, 1 for uint16 tokens, 20240801, 7 for
uint32 tokens; header[2]: the number of tokens; header[3]: vocabulary size; header[4]: tokenizer_hash(). llm.c's own
shards have 0 in the last two.

    ShardSet set;
    shard_set_begin(&set, "data/text", tokenizer_vocab_size(t), tokenizer_hash(t), 100000000);
    shard_set_write(&set, SHARD_TRAIN, ids, count);
    shard_set_publish(&set);

All shards are written in one scratch directory beside their destination and moved together at the end.
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
    char scratch[PATH_MAX]; // a directory
    int32_t vocab_size;
    uint32_t tokenizer_hash;
    int64_t shard_tokens; // the most that a shard holds
    FILE* files[SHARD_SPLITS];
    int64_t in_shard[SHARD_SPLITS]; // tokens written to the open file
    int counts[SHARD_SPLITS];       // files begun
    int64_t tokens[SHARD_SPLITS];   // in all files
} ShardSet;

static inline int shard_token_bytes(const ShardSet* set) { return set->vocab_size <= 65536 ? 2 : 4; }

static inline void shard_path(char* path, const ShardSet* set, int published, int split, int index) {
    if (published) path_format(path, "%s_%s_%06d.bin", set->prefix, shard_split_name(split), index);
    else path_format(path, "%s/%s_%06d.bin", set->scratch, shard_split_name(split), index);
}

static inline void shard_set_begin(ShardSet* set, const char* prefix, int32_t vocab_size,
                                   uint32_t tokenizer_hash, int64_t shard_tokens) {
    memset(set, 0, sizeof(*set));
    path_format(set->prefix, "%s", prefix);
    path_format(set->scratch, "%s.%d.partial", prefix, (int)getpid());
    set->vocab_size = vocab_size;
    set->tokenizer_hash = tokenizer_hash;
    set->shard_tokens = shard_tokens;
    const char* slash = strrchr(prefix, '/');
    if (slash && slash > prefix) {
        char directory[PATH_MAX];
        path_format(directory, "%.*s", (int)(slash - prefix), prefix);
        make_directories_or_fail(directory);
    }
    scratch_path_begin(set->scratch);
    make_directories_or_fail(set->scratch);
}

static inline void shard_write_header(const ShardSet* set, int split, const char* path) {
    int32_t header[SHARD_HEADER_INTS] = {0};
    int wide = shard_token_bytes(set) == 4;
    header[0] = wide ? 20240801 : 20240520;
    header[1] = wide ? 7 : 1;
    header[2] = (int32_t)set->in_shard[split];
    header[3] = set->vocab_size;
    header[4] = (int32_t)set->tokenizer_hash;
    rewind(set->files[split]);
    write_or_fail(header, sizeof(header), set->files[split], path);
}

static inline void shard_open(ShardSet* set, int split) {
    char path[PATH_MAX];
    shard_path(path, set, 0, split, set->counts[split]++);
    set->files[split] = open_or_fail(path, "wb");
    set->in_shard[split] = 0;
    shard_write_header(set, split, path);
}

static inline void shard_close(ShardSet* set, int split) {
    char path[PATH_MAX];
    if (!set->files[split]) return;
    shard_path(path, set, 0, split, set->counts[split] - 1);
    shard_write_header(set, split, path); // now the number of tokens is known
    close_written_or_fail(set->files[split], path);
    set->files[split] = NULL;
}

// Tokens of one shard, as they stand in the file.
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

// Moves all shards to their names. Shards that an earlier, larger set left under the following names are removed: a
// pattern such as NAME_train_*.bin would read them too.
static inline void shard_set_publish(ShardSet* set) {
    char from[PATH_MAX], to[PATH_MAX];
    for (int split = 0; split < SHARD_SPLITS; split++) shard_close(set, split);
    for (int split = 0; split < SHARD_SPLITS; split++) {
        for (int index = 0; index < set->counts[split]; index++) {
            shard_path(from, set, 0, split, index);
            shard_path(to, set, 1, split, index);
            if (rename(from, to) != 0) fail("%s: cannot rename to %s: %s", from, to, strerror(errno));
        }
        int index = set->counts[split];
        do shard_path(to, set, 1, split, index++);
        while (unlink(to) == 0);
    }
    scratch_path_remove();
}

#endif
