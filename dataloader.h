/*
From token shards to batches: the order in which training reads the tokens, and a thread that reads ahead.

    DataLoader* loader = loader_open("data/train_*.bin", T, vocab_size, tokenizer_hash, seed, 1);
    loader_start(loader, step * sequences_per_step + rank * B, (uint64_t)ranks * B, B);
    loader_next(loader, &tokens, &targets);                          // (B, T) each, valid until the next call

A shard is llm.c's: a header of 256 little-endian int32, then the tokens. header[0] and header[1] say the kind
(20240520, 1: uint16 tokens; 20240801, 7: uint32 tokens), header[2] the number of tokens, header[3] the size
of the vocabulary and header[4] the hash of the tokenizer that wrote them (0: not known, as in llm.c's own
files). The file's length must be exactly what the header says. Kinds may be mixed.

A shard of n tokens holds floor((n-1)/T) windows of T+1 tokens, at a stride of T: the last token of a window,
which is only a target, is the first of the next. No window crosses from one shard into another.

A run reads the N windows of all shards in a random order. Sequence number s of a run (0, 1, 2, ...) belongs
to epoch s / N; there it is the window random_permutation(seed, epoch, s % N, N). So the order depends on
seed, N and T alone, not on the micro-batch, its number or the number of ranks. Any place in the order is
found without reading the sequences before it. Without shuffling, for validation, sequence s is window s, and
the data end after the last window.

Shards are read with pread, never mapped, so memory use is loader_bytes(). An error in a shard ends the
process with one line that names the shard, and exit code 1. If the reader thread finds the error, the
loader_next() that needs the batch reports it.
*/
#ifndef DATALOADER_H
#define DATALOADER_H

#include <assert.h>
#include <glob.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>

// defines fail, malloc_or_fail, calloc_or_fail, path handling
#include "runtime/checks.h"
// defines random_permutation, random_stream
#include "runtime/random.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "token shards are little endian, and read as they are"
#endif

#define SHARD_HEADER_INTS 256
#define SHARD_HEADER_BYTES 1024
#define SHARD_MAGIC_UINT16 20240520
#define SHARD_VERSION_UINT16 1
#define SHARD_MAGIC_UINT32 20240801
#define SHARD_VERSION_UINT32 7

// At most this many shards, and at most a quarter of the files that the process may open, stay
// open. The loader opens further shards for every window that it reads, so that thousands of
// shards leave open files for everything else.
#define LOADER_OPEN_FILES 256
#define LOADER_MESSAGE_BYTES (PATH_MAX + 256)
#define LOADER_CHUNK_BYTES 16384

// ----------------------------------------------------------------------------
// Types

typedef struct {
    char* path;              // owned
    int file;                // descriptor, or -1: opened when read
    int token_bytes;         // 2 or 4
    uint32_t tokens;         // in the shard
    int vocab_size;          // of the tokenizer that wrote it; 0: not known
    uint32_t tokenizer_hash; // 0: not known
    uint64_t first_window;   // windows in the shards before this one
} TokenShard;

typedef struct {
    // The data: constant after loader_open(), so that any thread may read them.
    TokenShard* shards; // (shard_count), sorted by path
    int shard_count;
    int T;          // tokens of a sequence; a window is one token longer
    int vocab_size; // every token is below
    int shuffle;
    uint64_t seed;
    uint64_t order_stream;   // the random stream of epoch 0; epoch e has order_stream + e
    uint64_t windows;        // N
    uint64_t tokens;         // in all shards
    uint32_t tokenizer_hash; // of the shards whose header has one; 0: none has

    // The reader thread's task: batch i begins at sequence origin + i * stride.
    uint64_t origin, stride;
    int batch;
    int* tokens_of[2];  // (batch, T) each; batch i is in buffer i % 2
    int* targets_of[2]; // (batch, T)
    int rows_of[2];     // sequences in the buffer: `batch`, or fewer at the end of unshuffled data

    // Protected by the lock. The reader may fill batch i after the consumer has released batch i - 2. So it
    // reads one batch ahead of the one in use (filled < released + 2) and never writes to the one in use.
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t filled;   // number of batches that the reader has filled
    uint64_t released; // number of batches that the consumer no longer uses
    int stopping;      // 1: the reader must return
    int failed;        // 1: the reader has returned because of the error in `message`

    pthread_t reader;
    int reading;         // 1: a reader thread exists
    uint64_t next_batch; // the batch that the next loader_next() returns
    char message[LOADER_MESSAGE_BYTES];
} DataLoader;

// ----------------------------------------------------------------------------
// Opening shards

// Reads up to `bytes` at `offset`: the number read (fewer only at the end of the file), or -1 and errno.
static inline ssize_t shard_pread(int file, void* out, size_t bytes, off_t offset) {
    size_t used = 0;
    while (used < bytes) {
        ssize_t got = pread(file, (char*)out + used, bytes - used, offset + (off_t)used);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) break;
        used += (size_t)got;
    }
    return (ssize_t)used;
}

// Returns the bytes of a token, from magic and version.
static inline int shard_kind_or_fail(const char* path, int32_t magic, int32_t version) {
    if (magic != SHARD_MAGIC_UINT16 && magic != SHARD_MAGIC_UINT32)
        fail("%s: not a token shard: it begins with %d, not with %d (uint16 tokens) or %d (uint32 tokens)",
             path, magic, SHARD_MAGIC_UINT16, SHARD_MAGIC_UINT32);
    int expected = magic == SHARD_MAGIC_UINT16 ? SHARD_VERSION_UINT16 : SHARD_VERSION_UINT32;
    if (version != expected)
        fail("%s: token shard of version %d, must be %d for magic %d", path, version, expected, magic);
    return magic == SHARD_MAGIC_UINT16 ? 2 : 4;
}

// Fails unless the file has exactly the length that its header says.
static inline void shard_check_length(const char* path, off_t file_bytes, int32_t tokens, int token_bytes) {
    if (tokens < 0) fail("%s: its header says %d tokens", path, tokens);
    long long held = (long long)file_bytes - SHARD_HEADER_BYTES, meant = (long long)tokens * token_bytes;
    if (held < meant) fail("%s: truncated: it holds %lld of %d tokens", path, held / token_bytes, tokens);
    if (held > meant)
        fail("%s: %lld bytes longer than the %d tokens its header says", path, held - meant, tokens);
}

// Opens one shard and checks all but its tokens. The descriptor stays open.
static inline void shard_open(TokenShard* shard, int vocab_size, uint32_t tokenizer_hash) {
    const char* path = shard->path;
    struct stat info;
    if (stat(path, &info) != 0) fail("%s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) fail("%s: not a regular file", path);
    shard->file = open(path, O_RDONLY | O_CLOEXEC);
    if (shard->file < 0) fail("%s: %s", path, strerror(errno));

    int32_t header[SHARD_HEADER_INTS];
    ssize_t got = shard_pread(shard->file, header, sizeof(header), 0);
    if (got < 0) fail("%s: cannot read: %s", path, strerror(errno));
    if (got < SHARD_HEADER_BYTES)
        fail("%s: %lld bytes, too short for the header of %d bytes of a token shard", path, (long long)got,
             SHARD_HEADER_BYTES);
    shard->token_bytes = shard_kind_or_fail(path, header[0], header[1]);
    shard_check_length(path, info.st_size, header[2], shard->token_bytes);
    shard->tokens = (uint32_t)header[2];

    shard->vocab_size = header[3];
    if (vocab_size && header[3] != 0 && header[3] != vocab_size)
        fail("%s: written with a vocabulary of %d tokens, the model's has %d%s", path, header[3], vocab_size,
             header[3] > 0 && header[3] < vocab_size && !tokenizer_hash
                 ? "; if the rest is padding, --tokenizer tells the size without it"
                 : "");
    shard->tokenizer_hash = (uint32_t)header[4];
    if (tokenizer_hash && shard->tokenizer_hash && shard->tokenizer_hash != tokenizer_hash)
        fail("%s: written with another tokenizer: its hash is %08x, the given tokenizer's is %08x", path,
             shard->tokenizer_hash, tokenizer_hash);
}

// A hash of the header and of some tokens at the beginning, in the middle and at the end. Two files of the
// same length with different tokens most likely have different hashes.
static inline uint64_t shard_fingerprint(const TokenShard* shard) {
    char piece[4 * SHARD_HEADER_BYTES];
    const off_t length = SHARD_HEADER_BYTES + (off_t)shard->tokens * shard->token_bytes;
    const off_t last = length > (off_t)sizeof(piece) ? length - (off_t)sizeof(piece) : 0;
    const off_t places[3] = {0, last / 2, last};
    const int file = shard->file >= 0 ? shard->file : open(shard->path, O_RDONLY | O_CLOEXEC);
    uint64_t hash = 0;
    if (file < 0) fail("%s: %s", shard->path, strerror(errno));
    for (int i = 0; i < 3; i++) {
        const ssize_t got = shard_pread(file, piece, sizeof(piece), places[i]);
        if (got < 0) fail("%s: cannot read: %s", shard->path, strerror(errno));
        hash = hash_more(hash, piece, (size_t)got);
    }
    if (file != shard->file) close(file);
    return hash;
}

static inline int shard_compare_paths(const void* a, const void* b) {
    return strcmp(*(char* const*)a, *(char* const*)b);
}

// Finds the shards' paths, sorted by their bytes, whatever the locale. A pattern that matches nothing may
// still be the name of a file, for example a name with brackets.
static inline void loader_find_shards(DataLoader* loader, const char* pattern) {
    glob_t found;
    memset(&found, 0, sizeof(found));
    int status = glob(pattern, GLOB_NOSORT | GLOB_NOCHECK, NULL, &found);
    if (status == GLOB_NOSPACE) fail("out of memory: the list of files that match %s", pattern);
    if (status != 0) fail("%s: cannot list the files that match", pattern);
    struct stat info;
    if (found.gl_pathc == 1 && lstat(found.gl_pathv[0], &info) != 0) fail("%s: no file matches", pattern);
    qsort(found.gl_pathv, found.gl_pathc, sizeof(char*), shard_compare_paths);

    loader->shard_count = (int)found.gl_pathc;
    loader->shards = (TokenShard*)calloc_or_fail(found.gl_pathc, sizeof(TokenShard), "the list of shards");
    for (int i = 0; i < loader->shard_count; i++) {
        size_t bytes = strlen(found.gl_pathv[i]) + 1;
        loader->shards[i].path = (char*)malloc_or_fail(bytes, "the path of a shard");
        memcpy(loader->shards[i].path, found.gl_pathv[i], bytes);
        loader->shards[i].file = -1;
    }
    globfree(&found);
}

static inline void loader_free_shards(DataLoader* loader) {
    for (int i = 0; i < loader->shard_count; i++) {
        if (loader->shards[i].file >= 0) close(loader->shards[i].file);
        free(loader->shards[i].path);
    }
    free(loader->shards);
}

// The size of the vocabulary in the header of the pattern's first shard; 0 if the header does not have it.
static inline int loader_peek_vocabulary(const char* pattern) {
    DataLoader loader;
    memset(&loader, 0, sizeof(loader));
    loader_find_shards(&loader, pattern);
    shard_open(&loader.shards[0], 0, 0);
    int vocab_size = loader.shards[0].vocab_size;
    loader_free_shards(&loader);
    return vocab_size;
}

static inline int loader_open_files(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= 4 * LOADER_OPEN_FILES)
        return LOADER_OPEN_FILES;
    return (int)(limit.rlim_cur / 4);
}

// Opens the shards of `pattern`, a shell pattern (glob); quote it on a command line.
// `tokenizer_hash` 0 accepts any tokenizer that all shards share. `shuffle` 0 reads the windows
// once, in their order. The caller calls loader_close().
static inline DataLoader* loader_open(const char* pattern, int T, int vocab_size, uint32_t tokenizer_hash,
                                      uint64_t seed, int shuffle) {
    assert(T > 0 && vocab_size > 0);
    DataLoader* loader = (DataLoader*)calloc_or_fail(1, sizeof(DataLoader), "the data loader");
    loader->T = T;
    loader->vocab_size = vocab_size;
    loader->shuffle = shuffle;
    loader->seed = seed;
    loader->order_stream = random_stream("data order");
    pthread_mutex_init(&loader->lock, NULL);
    pthread_cond_init(&loader->changed, NULL);
    loader_find_shards(loader, pattern);

    const TokenShard *longest = &loader->shards[0], *hashed = NULL;
    for (int i = 0; i < loader->shard_count; i++) {
        TokenShard* shard = &loader->shards[i];
        shard_open(shard, vocab_size, tokenizer_hash);
        if (shard->tokenizer_hash && !hashed) hashed = shard;
        if (shard->tokenizer_hash && shard->tokenizer_hash != hashed->tokenizer_hash)
            fail("%s: written with another tokenizer than %s: their hashes are %08x and %08x", shard->path,
                 hashed->path, shard->tokenizer_hash, hashed->tokenizer_hash);
        if (i >= loader_open_files()) {
            close(shard->file);
            shard->file = -1;
        }
        if (shard->tokens > longest->tokens) longest = shard;
        shard->first_window = loader->windows;
        loader->windows += shard->tokens > 0 ? (shard->tokens - 1) / (uint32_t)T : 0;
        loader->tokens += shard->tokens;
    }
    loader->tokenizer_hash = hashed ? hashed->tokenizer_hash : 0;
    if (loader->windows == 0)
        fail("%s: no shard holds the %d + 1 tokens of one sequence and its last target; the longest, %s, "
             "holds %u",
             pattern, T, longest->path, longest->tokens);
    return loader;
}

// The number of sequences in an epoch, N.
static inline uint64_t loader_sequences(const DataLoader* loader) { return loader->windows; }

// The number of tokens in all shards, including tokens at their ends that belong to no window.
static inline uint64_t loader_tokens(const DataLoader* loader) { return loader->tokens; }

// The hash of the tokenizer that wrote the shards; 0 if no shard has one.
static inline uint32_t loader_tokenizer_hash(const DataLoader* loader) { return loader->tokenizer_hash; }

// ----------------------------------------------------------------------------
// A fingerprint of the data

#define FINGERPRINT_PIECE 16384                 // tokens
#define FINGERPRINT_TOKENS ((uint64_t)16 << 20) // about this many tokens are read

// Continues the hash over `count` tokens of a shard from `first` on, as 32 bits each.
static inline uint64_t shard_hash_tokens(uint64_t hash, const TokenShard* shard, int file, uint64_t first,
                                         int count) {
    uint32_t wide[FINGERPRINT_PIECE];
    uint16_t narrow[FINGERPRINT_PIECE];
    const size_t bytes = (size_t)count * (size_t)shard->token_bytes;
    const off_t offset = SHARD_HEADER_BYTES + (off_t)first * shard->token_bytes;
    void* to = shard->token_bytes == 2 ? (void*)narrow : (void*)wide;
    if (shard_pread(file, to, bytes, offset) != (ssize_t)bytes)
        fail("%s: cannot read %zu bytes at byte %lld", shard->path, bytes, (long long)offset);
    for (int i = 0; i < count && shard->token_bytes == 2; i++) wide[i] = narrow[i];
    return hash_more(hash, wide, (size_t)count * sizeof(uint32_t));
}

// A hash of all tokens in the order of the shards, independent of the files' names and kinds; never 0. With
// more than FINGERPRINT_TOKENS tokens it covers evenly spaced pieces and the last piece of every shard.
static inline uint64_t loader_fingerprint(const DataLoader* loader) {
    const uint64_t every = (loader->tokens + FINGERPRINT_TOKENS - 1) / FINGERPRINT_TOKENS;
    uint64_t hash = random_stream("fingerprint"), piece = 0;
    for (int i = 0; i < loader->shard_count; i++) {
        const TokenShard* shard = &loader->shards[i];
        const int file = shard->file >= 0 ? shard->file : open(shard->path, O_RDONLY | O_CLOEXEC);
        if (file < 0) fail("%s: %s", shard->path, strerror(errno));
        hash = hash_more(hash, &shard->tokens, sizeof(shard->tokens));
        for (uint64_t first = 0; first < shard->tokens; first += FINGERPRINT_PIECE, piece++) {
            const uint64_t left = shard->tokens - first;
            if (piece % every != 0 && left > FINGERPRINT_PIECE) continue;
            const int count = (int)(left < FINGERPRINT_PIECE ? left : FINGERPRINT_PIECE);
            hash = shard_hash_tokens(hash, shard, file, first, count);
        }
        if (file != shard->file) close(file);
    }
    return hash ? hash : 1;
}

// ----------------------------------------------------------------------------
// Reading

// The window of sequence number `sequence` of the run.
static inline uint64_t loader_window(const DataLoader* loader, uint64_t sequence) {
    if (!loader->shuffle) return sequence;
    uint64_t epoch = sequence / loader->windows;
    return random_permutation(loader->seed, loader->order_stream + epoch, sequence % loader->windows,
                              loader->windows);
}

// The shard that holds the window: the last one whose first_window is not
// above it. Never a shard without windows.
static inline const TokenShard* loader_shard_of(const DataLoader* loader, uint64_t window) {
    int low = 0, high = loader->shard_count; // first_window of `low` is <= window, that of `high` is above
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (loader->shards[middle].first_window <= window) low = middle;
        else high = middle;
    }
    return &loader->shards[low];
}

// Reads tokens first .. first+T of an open shard into tokens (T) and targets (T), the targets one place
// ahead. Returns 0, or -1 and a message.
static inline int shard_read_window(const DataLoader* loader, const TokenShard* shard, int file,
                                    uint64_t first, int* tokens, int* targets, char* message) {
    union {
        uint16_t narrow[LOADER_CHUNK_BYTES / 2];
        uint32_t wide[LOADER_CHUNK_BYTES / 4];
    } chunk;
    const int T = loader->T, chunk_tokens = LOADER_CHUNK_BYTES / 4;
    for (int t = 0; t <= T; t += chunk_tokens) {
        int count = T + 1 - t < chunk_tokens ? T + 1 - t : chunk_tokens;
        size_t bytes = (size_t)count * (size_t)shard->token_bytes;
        off_t offset = SHARD_HEADER_BYTES + (off_t)(first + (uint64_t)t) * shard->token_bytes;
        ssize_t got = shard_pread(file, &chunk, bytes, offset);
        if (got != (ssize_t)bytes) {
            snprintf(message, LOADER_MESSAGE_BYTES, "%s: cannot read %zu bytes at byte %lld: %s", shard->path,
                     bytes, (long long)offset, got < 0 ? strerror(errno) : "the file has become shorter");
            return -1;
        }
        for (int i = 0; i < count; i++) {
            uint32_t token = shard->token_bytes == 2 ? chunk.narrow[i] : chunk.wide[i];
            if (token >= (uint32_t)loader->vocab_size) {
                snprintf(message, LOADER_MESSAGE_BYTES,
                         "%s: token %u at offset %llu is outside the vocabulary of %d", shard->path, token,
                         (unsigned long long)(first + (uint64_t)(t + i)), loader->vocab_size);
                return -1;
            }
            if (t + i < T) tokens[t + i] = (int)token;
            if (t + i > 0) targets[t + i - 1] = (int)token;
        }
    }
    return 0;
}

// loader_read() for the reader thread, which must not end the process: it returns -1 and a message instead.
static inline int loader_try_read(const DataLoader* loader, uint64_t first_sequence, int count, int* tokens,
                                  int* targets, char* message) {
    for (int row = 0; row < count; row++) {
        uint64_t sequence = first_sequence + (uint64_t)row;
        if (!loader->shuffle && sequence >= loader->windows) return row;
        uint64_t window = loader_window(loader, sequence);
        const TokenShard* shard = loader_shard_of(loader, window);
        int file = shard->file >= 0 ? shard->file : open(shard->path, O_RDONLY | O_CLOEXEC);
        if (file < 0) {
            snprintf(message, LOADER_MESSAGE_BYTES, "%s: %s", shard->path, strerror(errno));
            return -1;
        }
        size_t place = (size_t)row * (size_t)loader->T;
        int status =
            shard_read_window(loader, shard, file, (window - shard->first_window) * (uint64_t)loader->T,
                              tokens + place, targets + place, message);
        if (file != shard->file) close(file);
        if (status != 0) return -1;
    }
    return count;
}

// Reads sequences first_sequence .. first_sequence+count-1 of the run into tokens and targets, (count, T)
// each. The target of a token is the next token. Returns the number of sequences: `count`, or fewer at the
// end of unshuffled data; the other rows do not change. May be called from any thread, at any time.
static inline int loader_read(const DataLoader* loader, uint64_t first_sequence, int count, int* tokens,
                              int* targets) {
    char message[LOADER_MESSAGE_BYTES];
    int rows = loader_try_read(loader, first_sequence, count, tokens, targets, message);
    if (rows < 0) fail("%s", message);
    return rows;
}

// ----------------------------------------------------------------------------
// Reading ahead

static inline void* loader_reader(void* argument) {
    DataLoader* loader = (DataLoader*)argument;
    pthread_mutex_lock(&loader->lock);
    while (!loader->stopping && !loader->failed) {
        if (loader->filled >= loader->released + 2) {
            pthread_cond_wait(&loader->changed, &loader->lock);
            continue;
        }
        uint64_t i = loader->filled;
        pthread_mutex_unlock(&loader->lock);
        int rows = loader_try_read(loader, loader->origin + i * loader->stride, loader->batch,
                                   loader->tokens_of[i % 2], loader->targets_of[i % 2], loader->message);
        pthread_mutex_lock(&loader->lock);
        if (rows < 0) {
            loader->failed = 1;
        } else {
            loader->rows_of[i % 2] = rows;
            loader->filled++;
        }
        pthread_cond_broadcast(&loader->changed);
    }
    pthread_mutex_unlock(&loader->lock);
    return NULL;
}

// Ends the reader thread and frees its buffers. It drops batches that were read ahead, and an error in them.
static inline void loader_stop(DataLoader* loader) {
    if (!loader->reading) return;
    pthread_mutex_lock(&loader->lock);
    loader->stopping = 1;
    pthread_cond_broadcast(&loader->changed);
    pthread_mutex_unlock(&loader->lock);
    pthread_join(loader->reader, NULL);
    loader->reading = 0;
    for (int i = 0; i < 2; i++) {
        free(loader->tokens_of[i]);
        free(loader->targets_of[i]);
    }
}

// Starts to read ahead: micro-batch i = 0, 1, 2, ... is the `batch` sequences from first_sequence +
// i * stride on. With R ranks, micro-batches of B sequences and steps of S sequences (of all
// ranks), a rank starts at step k with first_sequence = k * S + rank * B and stride = R * B. S is a
// multiple of R * B, so the same stride leads from one micro-batch to the next and from one step to
// the next. An earlier reader is stopped first.
static inline void loader_start(DataLoader* loader, uint64_t first_sequence, uint64_t stride, int batch) {
    assert(batch > 0);
    loader_stop(loader);
    loader->origin = first_sequence;
    loader->stride = stride;
    loader->batch = batch;
    loader->filled = loader->released = loader->next_batch = 0;
    loader->stopping = loader->failed = 0;
    for (int i = 0; i < 2; i++) {
        size_t places = (size_t)batch * (size_t)loader->T;
        loader->tokens_of[i] = (int*)calloc_or_fail(places, sizeof(int), "a batch of tokens");
        loader->targets_of[i] = (int*)calloc_or_fail(places, sizeof(int), "a batch of targets");
    }
    // The reader must not receive signals.
    sigset_t all, kept;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &kept);
    int status = pthread_create(&loader->reader, NULL, loader_reader, loader);
    pthread_sigmask(SIG_SETMASK, &kept, NULL);
    if (status != 0) fail("cannot start the thread that reads the data: %s", strerror(status));
    loader->reading = 1;
}

// Returns the next micro-batch: *tokens and *targets are (batch, T), belong to the loader, and are valid
// until the next call. The result is the number of sequences, as for loader_read(); 0 at the end of
// unshuffled data. Only one thread may call it.
static inline int loader_next(DataLoader* loader, const int** tokens, const int** targets) {
    assert(loader->reading);
    uint64_t i = loader->next_batch++;
    pthread_mutex_lock(&loader->lock);
    loader->released = i;
    pthread_cond_broadcast(&loader->changed);
    while (loader->filled <= i && !loader->failed) pthread_cond_wait(&loader->changed, &loader->lock);
    int missing = loader->filled <= i;
    pthread_mutex_unlock(&loader->lock);
    if (missing) {
        loader_stop(loader); // the thread has returned already
        fail("%s", loader->message);
    }
    *tokens = loader->tokens_of[i % 2];
    *targets = loader->targets_of[i % 2];
    return loader->rows_of[i % 2];
}

// ----------------------------------------------------------------------------
// Memory and end

// Bytes that the loader holds on the heap while it reads ahead micro-batches of
// `batch` sequences (0: it does not).
static inline size_t loader_bytes(const DataLoader* loader, int batch) {
    size_t bytes = sizeof(DataLoader) + (size_t)loader->shard_count * sizeof(TokenShard);
    for (int i = 0; i < loader->shard_count; i++) bytes += strlen(loader->shards[i].path) + 1;
    return bytes + 4 * (size_t)batch * (size_t)loader->T * sizeof(int);
}

static inline void loader_close(DataLoader* loader) {
    if (!loader) return;
    loader_stop(loader);
    loader_free_shards(loader);
    pthread_cond_destroy(&loader->changed);
    pthread_mutex_destroy(&loader->lock);
    free(loader);
}

#endif
