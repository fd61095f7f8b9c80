/*
Processes that train one model together: who they are, and the sums they make.

    signals_start();                                       // first of all (runtime/signals.h)
    comm_start();
    loader_start(loader, comm_rank() * B, comm_size() * B, B);
    comm_reduce_scatter(grads, count, stream);             // each rank gets its shard of the sum
    comm_all_gather(params, bytes, stream);                // every rank gets every rank's shard
    comm_wait(stream);                                     // what is queued on `stream` from here on comes after
    comm_sum(&loss, 1);                                    // numbers of the host, now

Ranks are the processes that mpirun or srun has started; without these there is one, and every function below does nothing. What moves
the bytes is chosen at build: MPI (COMM_MPI) for numbers of the host, and for arrays of the device by way of host memory; NCCL
(COMM_NCCL, which MPI starts) for arrays of the device, on a stream of its own, so that they move while the device computes. A
build with neither is a single process, and refuses to be started as one of several.

Shard r of N of an array is its r-th N-th. A sum over ranks is made in float_acc. By MPI it is made by the shard's owner in the
order of the ranks, so that its bits depend on N alone; NCCL has an order of its own, which the machines and N decide. Either
way every rank has the same bits. Of an array of n bytes each rank sends and receives (N - 1) / N n in comm_reduce_scatter(), and
the same in comm_all_gather().

Before anything is done together, comm_must_agree("--batch", "%d", batch) makes sure that all mean the same.
A rank that fails says why, with its number and host, and ends the others; where one is killed, the launcher does. Ranks that
do not hear of the others for COMM_PATIENCE seconds give up; while they start and end, for COMM_START_PATIENCE.
Include the device's header (dev/cpu/device.h or its CUDA twin) first.
*/
#ifndef RUNTIME_COMM_H
#define RUNTIME_COMM_H

#include <assert.h>
#include <omp.h>
#include <sched.h>
#include <sys/resource.h>
#include <time.h>
#include "runtime/checks.h"    // defines fail, failure_begin, failure_end
#include "runtime/precision.h" // defines float_acc
#include "runtime/signals.h"   // defines signals_on_alarm
#if defined(COMM_MPI)
#include <mpi.h>
#endif
#if defined(COMM_NCCL)
#include <nccl.h>
#endif

// A shard holds a multiple of this many elements: whole packs of every type, and whole blocks of weight decay.
enum { COMM_ALIGNMENT = 64 };
enum { COMM_PATIENCE = 1800 };       // seconds; writing a checkpoint must take less
enum { COMM_START_PATIENCE = 300 };  // seconds, where MOBA_START_SECONDS does not say otherwise
#define COMM_PIECE ((size_t)8 << 20) // bytes of a buffer of the host

typedef struct {
    int rank, size;             // size 0: not started, which is one process
    int local_rank, local_size; // among the ranks of this host
    char name[192];             // how this rank's messages begin
    int of_others;              // 1: this rank fails because another one has
    char* received;             // (COMM_PIECE) of the host
    char* sent;                 // (COMM_PIECE) of the host, where the device's memory is its own
} Comm;

static Comm comm;

static inline int comm_rank(void) { return comm.rank; }
static inline int comm_size(void) { return comm.size > 1 ? comm.size : 1; }
static inline int comm_local_size(void) { return comm.local_size > 1 ? comm.local_size : 1; }

// Bytes of host memory that the functions below hold.
static inline size_t comm_bytes(void) { return comm.received ? COMM_PIECE * (comm.sent ? 2 : 1) : 0; }

// How many processes the launcher says that there are; 0: there was none. The first that says it is the nearest one: where
// mpirun's own daemons are tasks of srun, their number is in the environment as well.
static inline int comm_launched(void) {
    static const char* const counts[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (int i = 0; i < 3; i++) {
        const char* text = getenv(counts[i]);
        if (!text) continue;
        // srun gives a lone shell one task, too: nobody has started many processes then.
        return i == 0 || atoi(text) > 1 ? atoi(text) : 0;
    }
    return 0;
}

#if !defined(COMM_MPI)

// ----------------------------------------------------------------------------
// A single process

static inline void comm_start(void) {
    if (comm_launched() > 1)
        fail("started as one of %d processes, but this build is for one: install MPI (scripts/install.sh), "
             "and make it anew",
             comm_launched());
}

static inline void comm_broadcast(void* bytes, size_t count) { (void)bytes, (void)count; }
static inline void comm_sum(double* values, int count) { (void)values, (void)count; }
static inline int comm_max(int value) { return value; }
static inline void comm_barrier(void) {}
static inline void comm_reduce_scatter(float_acc* values, size_t count, stream_t stream) {
    (void)values, (void)count, (void)stream;
}
static inline void comm_all_gather(void* values, size_t bytes, stream_t stream) {
    (void)values, (void)bytes, (void)stream;
}
static inline void comm_all_reduce(float_acc* values, size_t count, stream_t stream) {
    (void)values, (void)count, (void)stream;
}
static inline void comm_wait(stream_t stream) { (void)stream; }
static inline void comm_synchronize(stream_t stream) { stream_synchronize(stream); }
static inline int comm_can_be_recorded(void) { return 1; }

#else

// ----------------------------------------------------------------------------
// MPI: numbers of the host

static inline double comm_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Fails for what is another rank's failure as it looks from here. Who knows more, that rank or the launcher, speaks first.
__attribute__((format(printf, 1, 2), noreturn)) static inline void comm_fail_of_others(const char* format,
                                                                                       ...) {
    va_list arguments;
    va_start(arguments, format);
    comm.of_others = 1;
    fail_with(1, format, arguments);
}

// Called while something is waited for, with the clock of the wait's begin: leaves the core to others, and gives up in the end.
static inline void comm_be_patient(double since) {
    sched_yield();
    if (comm_clock() - since > COMM_PATIENCE)
        comm_fail_of_others("no answer from the other ranks for %d seconds: one of them is gone, or hangs",
                            COMM_PATIENCE);
}

static inline void comm_finish(MPI_Request* requests, int count) {
    const double since = comm_clock();
    for (int done = 0;;) {
        MPI_Testall(count, requests, &done, MPI_STATUSES_IGNORE);
        if (done) return;
        comm_be_patient(since);
    }
}

static inline void comm_barrier(void) {
    MPI_Request request;
    if (!comm.size) return;
    MPI_Ibarrier(MPI_COMM_WORLD, &request);
    comm_finish(&request, 1);
}

// The bytes of rank 0, to all.
static inline void comm_broadcast(void* bytes, size_t count) {
    MPI_Request request;
    if (!comm.size) return;
    assert(count <= INT_MAX);
    MPI_Ibcast(bytes, (int)count, MPI_BYTE, 0, MPI_COMM_WORLD, &request);
    comm_finish(&request, 1);
}

// `bytes` of each rank, in the order of the ranks.
static inline void comm_gather_bytes(void* all, const void* mine, size_t bytes) {
    MPI_Request request;
    assert(bytes <= INT_MAX);
    MPI_Iallgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, MPI_COMM_WORLD, &request);
    comm_finish(&request, 1);
}

// The sums over the ranks, in their order.
static inline void comm_sum(double* values, int count) {
    const int N = comm_size();
    if (!comm.size) return;
    double* all = (double*)malloc_or_fail((size_t)N * (size_t)count * sizeof(double), "numbers of all ranks");
    comm_gather_bytes(all, values, (size_t)count * sizeof(double));
    for (int i = 0; i < count; i++) {
        values[i] = all[i];
        for (int r = 1; r < N; r++) values[i] += all[r * count + i];
    }
    free(all);
}

static inline int comm_max(int value) {
    MPI_Request request;
    int largest = value;
    if (!comm.size) return value;
    MPI_Iallreduce(&value, &largest, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD, &request);
    comm_finish(&request, 1);
    return largest;
}

#if !defined(COMM_NCCL)

// ----------------------------------------------------------------------------
// MPI: arrays of the device. A device of its own memory is waited for, and its arrays go through the host's a piece at a time.

static inline void comm_start_device(void) {
    comm.received = (char*)malloc_or_fail(COMM_PIECE, "sums of all ranks");
    if (DEVICE_HAS_OWN_MEMORY) comm.sent = (char*)malloc_or_fail(COMM_PIECE, "sums of all ranks");
}

static inline void comm_stop_device(void) {
    free(comm.received);
    free(comm.sent);
}

// sum[i] = of[0][i] + of[1][i] + ..., in this order; sum may be one of them.
static inline void comm_add_up(float_acc* sum, const float_acc** of, int N, size_t count) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < count; i++) {
        float_acc total = of[0][i];
        for (int r = 1; r < N; r++) total += of[r][i];
        sum[i] = total;
    }
}

// Elements at .. at + count of every rank's shard: sends those of the others, receives their part of its own, adds up.
static inline void comm_reduce_piece(float_acc* values, size_t shard, size_t at, size_t count,
                                     MPI_Request* requests, const float_acc** parts, stream_t stream) {
    const int N = comm_size(), me = comm_rank();
    const int bytes = (int)(count * sizeof(float_acc));
    int pending = 0;
    for (int r = 0; r < N; r++) {
        float_acc* theirs = values + (size_t)r * shard + at;
        if (DEVICE_HAS_OWN_MEMORY) {
            float_acc* copy = (float_acc*)(void*)comm.sent + (size_t)r * count;
            copy_to_host(copy, theirs, (size_t)bytes, stream);
            stream_synchronize(stream);
            theirs = copy;
        }
        parts[r] = r == me ? theirs : (float_acc*)(void*)comm.received + (size_t)r * count;
        if (r == me) continue;
        MPI_Irecv((void*)parts[r], bytes, MPI_BYTE, r, 0, MPI_COMM_WORLD, &requests[pending++]);
        MPI_Isend(theirs, bytes, MPI_BYTE, r, 0, MPI_COMM_WORLD, &requests[pending++]);
    }
    comm_finish(requests, pending);
    float_acc* own = values + (size_t)me * shard + at;
    float_acc* sum = DEVICE_HAS_OWN_MEMORY ? (float_acc*)(void*)comm.received + (size_t)me * count : own;
    comm_add_up(sum, parts, N, count);
    if (!DEVICE_HAS_OWN_MEMORY) return;
    copy_to_device(own, sum, (size_t)bytes, stream);
    stream_synchronize(stream);
}

// Queues values (count) -> its sum over the ranks, of which each rank gets its own shard. The other shards may be anything after.
static inline void comm_reduce_scatter(float_acc* values, size_t count, stream_t stream) {
    const size_t N = (size_t)comm_size(), shard = count / N, most = COMM_PIECE / sizeof(float_acc) / N;
    if (!comm.size) return;
    assert(count % (N * COMM_ALIGNMENT) == 0 && most > 0);
    MPI_Request* requests =
        (MPI_Request*)malloc_or_fail(2 * N * sizeof(MPI_Request), "messages to all ranks");
    const float_acc** parts =
        (const float_acc**)malloc_or_fail(N * sizeof(float_acc*), "messages of all ranks");
    stream_synchronize(stream);
    for (size_t at = 0; at < shard; at += most)
        comm_reduce_piece(values, shard, at, shard - at < most ? shard - at : most, requests, parts, stream);
    free((void*)parts);
    free(requests);
}

// Queues values (bytes), of which each rank has its shard -> the same with all shards.
static inline void comm_all_gather(void* values, size_t bytes, stream_t stream) {
    const size_t N = (size_t)comm_size(), shard = bytes / N;
    if (!comm.size) return;
    char *all = (char*)values, *mine = all + (size_t)comm_rank() * shard;
    stream_synchronize(stream);
    if (!DEVICE_HAS_OWN_MEMORY) {
        MPI_Datatype block; // counts are ints, and arrays may have more bytes
        MPI_Request request;
        assert(shard % COMM_ALIGNMENT == 0);
        MPI_Type_contiguous(COMM_ALIGNMENT, MPI_BYTE, &block);
        MPI_Type_commit(&block);
        MPI_Iallgather(MPI_IN_PLACE, 0, block, all, (int)(shard / COMM_ALIGNMENT), block, MPI_COMM_WORLD,
                       &request);
        comm_finish(&request, 1);
        MPI_Type_free(&block);
        return;
    }
    const size_t most = COMM_PIECE / N;
    for (size_t at = 0; at < shard; at += most) {
        const size_t some = shard - at < most ? shard - at : most;
        copy_to_host(comm.sent, mine + at, some, stream);
        stream_synchronize(stream);
        comm_gather_bytes(comm.received, comm.sent, some);
        for (size_t r = 0; r < N; r++)
            copy_to_device(all + r * shard + at, comm.received + r * some, some, stream);
        stream_synchronize(stream);
    }
}

// Queues values (count), any number of them that is small -> their sums over the ranks, on every rank.
static inline void comm_all_reduce(float_acc* values, size_t count, stream_t stream) {
    const size_t N = (size_t)comm_size(), bytes = count * sizeof(float_acc);
    if (!comm.size) return;
    float_acc* all = (float_acc*)malloc_or_fail((N + 1) * bytes, "numbers of all ranks");
    float_acc* mine = all + N * count;
    copy_to_host(mine, values, bytes, stream);
    stream_synchronize(stream);
    comm_gather_bytes(all, mine, bytes);
    for (size_t i = 0; i < count; i++) {
        mine[i] = all[i];
        for (size_t r = 1; r < N; r++) mine[i] += all[r * count + i];
    }
    copy_to_device(values, mine, bytes, stream);
    stream_synchronize(stream);
    free(all);
}

// What is queued on the stream after this comes after all that the functions above have queued.
static inline void comm_wait(stream_t stream) { (void)stream; }

// stream_synchronize(), with an eye on the other ranks.
static inline void comm_synchronize(stream_t stream) { stream_synchronize(stream); }

// Whether what is queued can be part of a graph: not where the host does it.
static inline int comm_can_be_recorded(void) { return !comm.size; }

#else

// ----------------------------------------------------------------------------
// NCCL: arrays of the device. Everything is queued on comm_nccl's own stream behind what is on the caller's, which goes on.

typedef struct {
    ncclComm_t ranks;
    cudaStream_t stream;
    cudaEvent_t before, after;
    int pending; // 1: something is queued that nobody waits for yet
} CommNccl;

static CommNccl comm_nccl;

// What reaches this rank by way of the others, or the network, is mostly that one of them is gone.
static inline void comm_check(ncclResult_t result, const char* doing) {
    if (result == ncclSuccess || result == ncclInProgress) return;
    const char* more = ncclGetLastError(comm_nccl.ranks);
    if (result == ncclRemoteError || result == ncclSystemError)
        comm_fail_of_others("another rank is gone, or the way to it: NCCL cannot %s: %s (%s)", doing,
                            ncclGetErrorString(result), more ? more : "");
    fail("NCCL: cannot %s: %s (%s)", doing, ncclGetErrorString(result), more ? more : "");
}

static inline void comm_start_device(void) {
    ncclUniqueId id;
    memset(&id, 0, sizeof(id));
    if (comm_rank() == 0) comm_check(ncclGetUniqueId(&id), "begin");
    comm_broadcast(&id, sizeof(id));
    comm_check(ncclCommInitRank(&comm_nccl.ranks, comm_size(), id, comm_rank()), "join the ranks");
    device_check(cudaStreamCreateWithFlags(&comm_nccl.stream, cudaStreamNonBlocking), "make a stream");
    device_check(cudaEventCreateWithFlags(&comm_nccl.before, cudaEventDisableTiming), "make an event");
    device_check(cudaEventCreateWithFlags(&comm_nccl.after, cudaEventDisableTiming), "make an event");
}

static inline void comm_stop_device(void) {
    comm_check(ncclCommDestroy(comm_nccl.ranks), "leave the ranks");
    device_check(cudaStreamDestroy(comm_nccl.stream), "free a stream");
    device_check(cudaEventDestroy(comm_nccl.before), "free an event");
    device_check(cudaEventDestroy(comm_nccl.after), "free an event");
}

static inline void comm_follow(stream_t stream) {
    device_check(cudaEventRecord(comm_nccl.before, stream), "record an event");
    device_check(cudaStreamWaitEvent(comm_nccl.stream, comm_nccl.before, 0), "wait for an event");
    comm_nccl.pending = 1;
}

// The type of what is summed: fp32 on a GPU, whatever the parameters' type is.
static const ncclDataType_t comm_nccl_type = ncclFloat32;
static_assert(sizeof(float_acc) == 4, "NCCL is told that sums are fp32");

// Queues values (count) -> its sum over the ranks, of which each rank gets its own shard. The other shards may be anything after.
static inline void comm_reduce_scatter(float_acc* values, size_t count, stream_t stream) {
    const size_t N = (size_t)comm_size(), shard = count / N;
    if (!comm.size) return;
    assert(count % (N * COMM_ALIGNMENT) == 0);
    comm_follow(stream);
    comm_check(ncclReduceScatter(values, values + (size_t)comm_rank() * shard, shard, comm_nccl_type, ncclSum,
                                 comm_nccl.ranks, comm_nccl.stream),
               "add up gradients");
}

// Queues values (bytes), of which each rank has its shard -> the same with all shards.
static inline void comm_all_gather(void* values, size_t bytes, stream_t stream) {
    const size_t N = (size_t)comm_size(), shard = bytes / N;
    if (!comm.size) return;
    comm_follow(stream);
    comm_check(ncclAllGather((char*)values + (size_t)comm_rank() * shard, values, shard, ncclUint8,
                             comm_nccl.ranks, comm_nccl.stream),
               "gather shards");
}

// Queues values (count), any number of them that is small -> their sums over the ranks, on every rank.
static inline void comm_all_reduce(float_acc* values, size_t count, stream_t stream) {
    if (!comm.size) return;
    comm_follow(stream);
    comm_check(
        ncclAllReduce(values, values, count, comm_nccl_type, ncclSum, comm_nccl.ranks, comm_nccl.stream),
        "add up numbers");
}

// What is queued on the stream after this comes after all that the functions above have queued.
static inline void comm_wait(stream_t stream) {
    if (!comm_nccl.pending)
        return; // while a graph is recorded, what is not part of it must not be waited for
    comm_nccl.pending = 0;
    device_check(cudaEventRecord(comm_nccl.after, comm_nccl.stream), "record an event");
    device_check(cudaStreamWaitEvent(stream, comm_nccl.after, 0), "wait for an event");
}

// stream_synchronize(), with an eye on the other ranks: a kernel of NCCL that waits for one which is gone would never end.
static inline void comm_synchronize(stream_t stream) {
    const double since = comm_clock();
    if (!comm.size) {
        stream_synchronize(stream);
        return;
    }
    for (cudaError_t status; (status = cudaStreamQuery(stream)) != cudaSuccess;) {
        ncclResult_t result = ncclSuccess;
        if (status != cudaErrorNotReady) device_check(status, "finish what was queued");
        comm_check(ncclCommGetAsyncError(comm_nccl.ranks, &result), "ask for errors");
        comm.of_others = result != ncclSuccess && result != ncclInProgress; // whatever it is called
        comm_check(result, "go on with the other ranks");
        comm_be_patient(since);
    }
}

// Whether what is queued can be part of a graph.
static inline int comm_can_be_recorded(void) { return 1; }

#endif

// ----------------------------------------------------------------------------
// Start and end

// What MPI and NCCL do while they start and end may wait for ever, for a rank that is not there or by a network that leads
// nowhere, and nothing can be asked meanwhile: so a clock ends the process, which ends the job. The thread that waits for signals
// prints comm_last_words, which the main thread made before.
static char comm_last_words[512];

static inline void comm_time_is_over(void) {
    const ssize_t wrote = write(STDERR_FILENO, comm_last_words, strlen(comm_last_words));
    (void)wrote; // there is nobody else to tell
    _exit(1);
}

// The rank by the launcher's word, which is known before MPI has started; 0 where it has none.
static inline int comm_launched_rank(void) {
    static const char* const names[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"};
    for (int i = 0; i < 4; i++)
        if (getenv(names[i])) return atoi(getenv(names[i]));
    return 0;
}

// The clock runs until comm_watch_end(). A second apart, so that one speaks for all.
static inline void comm_watch(const char* doing) {
    const char* wanted = getenv("MOBA_START_SECONDS");
    const int given = wanted ? atoi(wanted) : 0, rank = comm_launched_rank();
    const int seconds = (given > 0 ? given : COMM_START_PATIENCE) + (rank < 20 ? rank : 20);
    char host[128] = "?", who[sizeof(comm.name)];
    (void)gethostname(host, sizeof(host) - 1);
    if (comm.size) snprintf(who, sizeof(who), "%s", program_name);
    else snprintf(who, sizeof(who), "%.40s: rank %d on %.100s", program_name, rank, host);
    snprintf(comm_last_words, sizeof(comm_last_words),
             "%s: %s is not done after %d s: another rank is not there, or the network between them; see "
             "docs/distributed.md, Networks\n",
             who, doing, seconds);
    signals_on_alarm(comm_time_is_over);
    alarm((unsigned)seconds);
}

static inline void comm_watch_end(void) {
    alarm(0);
    signals_on_alarm(NULL);
}

// Quarters of a second that this rank waits before it tells of a failure. All ranks often fail alike: then the first of them
// speaks, and has ended the others before it is their turn. Far ones have a turn on each host. Who fails for another's sake leaves
// it the time to say so, and the launcher to find it dead.
static inline int comm_turn(void) {
    enum { TURNS = 20, OF_OTHERS = 4 * 6 };
    const int local = comm.local_rank < TURNS ? comm.local_rank : TURNS, far = comm_rank() >= TURNS;
    const int turn = far ? TURNS + local : comm_rank();
    return (turn > 0 ? 4 + turn : 0) + (comm.of_others ? OF_OTHERS : 0);
}

static inline void comm_failure_begin(void) {
    const int turn = comm_turn();
    struct timespec wait = {turn / 4, turn % 4 * 250000000L};
    if (turn > 0) nanosleep(&wait, NULL);
}

static inline void comm_failure_end(int exit_code) {
    fflush(stderr);
    scratch_path_remove();
    comm_watch("ending the others");
    MPI_Abort(MPI_COMM_WORLD, exit_code);
}

// At every exit that is no failure: all ranks come to it, though the first may have old checkpoints to remove before.
static inline void comm_stop(void) {
    comm_barrier();
    comm_watch("the end");
    failure_begin = NULL;
    failure_end = NULL;
    comm_stop_device();
    MPI_Finalize();
    comm_watch_end();
}

// mpirun binds a rank to one core, or to its memory's. Where that is less than its part of what this host lends the job, the
// binding is taken off.
static inline void comm_choose_threads(void) {
    cpu_set_t bound, lent;
    if (sched_getaffinity(0, sizeof(bound), &bound) != 0) return;
    memset(&lent, 0xFF, sizeof(lent));
    (void)sched_setaffinity(0, sizeof(lent), &lent); // the system leaves out what is not lent
    if (sched_getaffinity(0, sizeof(lent), &lent) != 0) return;
    const int fair = CPU_COUNT(&lent) / comm_local_size(), threads = fair > 1 ? fair : 1;
    if (CPU_COUNT(&bound) >= threads) (void)sched_setaffinity(0, sizeof(bound), &bound);
    if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(threads);
}

// Between machines every pair of ranks is a file or two, and many systems begin with a bound of 1024.
static inline void comm_allow_files(void) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
    files.rlim_cur = files.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &files);
}

// Only rank 0 prints; what another one has to say of a failure goes to stderr.
static inline void comm_be_quiet(void) {
    if (comm_rank() > 0 && !freopen("/dev/null", "w", stdout)) fail("/dev/null: %s", strerror(errno));
}

static inline void comm_start(void) {
    int provided, length;
    char host[MPI_MAX_PROCESSOR_NAME];
    MPI_Comm neighbours;
    const int launched = comm_launched();
    if (!launched) return;
    comm_watch("the start");
    comm_allow_files();
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided);
    MPI_Comm_size(MPI_COMM_WORLD, &comm.size);
    MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank);
    if (comm.size != launched)
        fail("started as one of %d processes, but MPI knows of %d: start them by mpirun, or srun --mpi=pmix",
             launched, comm.size);
    MPI_Get_processor_name(host, &length);
    snprintf(comm.name, sizeof(comm.name), "%s: rank %d on %.100s", program_name, comm.rank, host);
    program_name = comm.name;
    failure_begin = comm_failure_begin;
    failure_end = comm_failure_end;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, comm.rank, MPI_INFO_NULL, &neighbours);
    MPI_Comm_rank(neighbours, &comm.local_rank);
    MPI_Comm_size(neighbours, &comm.local_size);
    MPI_Comm_free(&neighbours);
    comm_be_quiet();
    comm_choose_threads();
    device_choose(comm.local_rank, comm.local_size);
    comm_start_device();
    comm_watch_end();
    atexit(comm_stop);
}

#endif

// ----------------------------------------------------------------------------
// Agreement

// All ranks call it in the same order, with what each of them is about to do; fails on those that differ from the first.
__attribute__((format(printf, 2, 3))) static inline void comm_must_agree(const char* what, const char* format,
                                                                         ...) {
    typedef struct {
        char what[PATH_MAX], value[PATH_MAX];
    } Fact;
    Fact* mine = (Fact*)calloc_or_fail(2, sizeof(Fact), "what ranks must agree on");
    Fact* theirs = mine + 1;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(mine->value, sizeof(mine->value), format, arguments);
    va_end(arguments);
    snprintf(mine->what, sizeof(mine->what), "%s", what);
    memcpy(theirs, mine, sizeof(Fact));
    comm_broadcast(theirs, sizeof(Fact));
    if (strcmp(mine->what, theirs->what))
        fail("has %s %s, where rank 0 has %s %s", mine->what, mine->value, theirs->what, theirs->value);
    if (strcmp(mine->value, theirs->value))
        fail("%s is %s, but on rank 0 it is %s", mine->what, mine->value, theirs->value);
    free(mine);
}

#endif
