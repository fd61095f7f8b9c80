/*
Processes (ranks) that train one model together: their numbers, and their collective operations.

    signals_start();                              // first of all (runtime/signals.h)
    comm_start();
    loader_start(loader, comm_rank() * B, comm_size() * B, B);
    comm_reduce_scatter(grads, count, stream);    // each rank gets its shard of the sum
    comm_all_gather(params, bytes, stream);       // every rank gets every rank's shard
    comm_wait(stream);                            // later work on `stream` runs after the two
    comm_sum(&loss, 1);                           // numbers in host memory; complete on return
    comm_must_agree("--batch", "%d", batch);      // fails if a rank has another value than rank 0

mpirun or srun starts the ranks. Without them there is one rank, and the collective operations do nothing. A
build with COMM_MPI uses MPI for host numbers and, through host memory, for device arrays. With COMM_NCCL as
well, NCCL moves the device arrays on its own stream while the device computes. A build without MPI refuses
to start as one of several processes.

Shard r of an array is the r-th of N equal parts. Sums of arrays are in float_acc; comm_sum() adds doubles. With MPI the owner of a
shard adds the ranks in their order, so the bits depend on N alone; NCCL's order depends on N and the
machines. Either way every rank gets the same bits. comm_reduce_scatter() and comm_all_gather() each send and
receive (N - 1) / N of the array per rank.

A rank that fails prints the reason with its number and host, and ends the others; if one is killed, the
launcher ends them. A rank gives up after COMM_PATIENCE seconds without an answer (COMM_START_PATIENCE at
start and end).
*/
#ifndef RUNTIME_COMM_H
#define RUNTIME_COMM_H

#include <assert.h>
#include <omp.h>
#include <sched.h>
#include <sys/resource.h>
#include <time.h>
#include "runtime/checks.h"    // defines fail, failure_begin, failure_end
#include "runtime/device.h"    // defines stream_t
#include "runtime/precision.h" // defines float_acc
#include "runtime/signals.h"   // defines signals_on_alarm
#if defined(COMM_MPI)
#include <mpi.h>
#endif
#if defined(COMM_NCCL)
#include <nccl.h>
#endif

// The elements of a shard are a multiple of this: whole packs of every
// type, and whole blocks of weight decay.
enum { COMM_ALIGNMENT = 64 };
enum { COMM_PATIENCE = 1800 };       // seconds; writing a checkpoint must take less
enum { COMM_START_PATIENCE = 300 };  // seconds; the environment variable MOBA_START_SECONDS overrides it
#define COMM_PIECE ((size_t)8 << 20) // bytes of one host buffer

typedef struct {
    int rank, size;             // size 0: not started by a launcher, so one process
    int local_rank, local_size; // among the ranks of this host
    char name[192];             // the beginning of this rank's messages
    int of_others;              // 1: this rank fails because another one failed
    char* received;             // (COMM_PIECE) host memory
    char* sent;                 // (COMM_PIECE) host memory, if the device has memory of its own
} Comm;

static Comm comm;

static inline int comm_rank(void) { return comm.rank; }
static inline int comm_size(void) { return comm.size > 1 ? comm.size : 1; }
static inline int comm_local_size(void) { return comm.local_size > 1 ? comm.local_size : 1; }

// Bytes of host memory that the functions below hold.
static inline size_t comm_bytes(void) { return comm.received ? COMM_PIECE * (comm.sent ? 2 : 1) : 0; }

// The launcher's number of processes; 0: no launcher. The first variable found belongs to the nearest
// launcher: if mpirun's daemons are tasks of srun, the environment has the number of the daemons as well.
static inline int comm_launched(void) {
    static const char* const counts[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (int i = 0; i < 3; i++) {
        const char* text = getenv(counts[i]);
        if (!text) continue;
        // srun sets 1 for a lone shell, too; that is no launch of several processes.
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

// Fails because of another rank's failure. This rank waits before it prints (comm_turn), so that the failed
// rank or the launcher prints the root cause first.
__attribute__((format(printf, 1, 2), noreturn)) static inline void comm_fail_of_others(const char* format,
                                                                                       ...) {
    va_list arguments;
    va_start(arguments, format);
    comm.of_others = 1;
    fail_with(1, format, arguments);
}

// One step of a busy wait that began at the time `since`: yields the core,
// and fails after COMM_PATIENCE seconds.
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

// Every rank gets the bytes of rank 0.
static inline void comm_broadcast(void* bytes, size_t count) {
    MPI_Request request;
    if (!comm.size) return;
    assert(count <= INT_MAX);
    MPI_Ibcast(bytes, (int)count, MPI_BYTE, 0, MPI_COMM_WORLD, &request);
    comm_finish(&request, 1);
}

// Every rank gets `bytes` bytes of each rank, in the order of the ranks.
static inline void comm_gather_bytes(void* all, const void* mine, size_t bytes) {
    MPI_Request request;
    assert(bytes <= INT_MAX);
    MPI_Iallgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, MPI_COMM_WORLD, &request);
    comm_finish(&request, 1);
}

// Replaces each value by its sum over the ranks, added in the order of the ranks.
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
// MPI: arrays of the device. If the device has its own memory, the functions synchronise with it and copy its
// arrays through host memory, a piece at a time.

static inline void comm_start_device(void) {
    comm.received = (char*)malloc_or_fail(COMM_PIECE, "sums of all ranks");
    if (DEVICE_HAS_OWN_MEMORY) comm.sent = (char*)malloc_or_fail(COMM_PIECE, "sums of all ranks");
}

static inline void comm_stop_device(void) {
    free(comm.received);
    free(comm.sent);
}

// sum[i] = of[0][i] + of[1][i] + ..., in this order; `sum` may be one of these arrays.
static inline void comm_add_up(float_acc* sum, const float_acc** of, int N, size_t count) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < count; i++) {
        float_acc total = of[0][i];
        for (int r = 1; r < N; r++) total += of[r][i];
        sum[i] = total;
    }
}

// Reduces elements at .. at + count - 1 of every shard: sends each other rank its shard's elements, receives
// the other ranks' elements of this rank's shard, and adds them up.
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

// Queues the sum of values (count) over the ranks. Each rank gets its own shard of the sum;
// the other shards are undefined afterwards.
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

// Queues a gather: each rank has its shard of values (bytes), and gets all other shards.
static inline void comm_all_gather(void* values, size_t bytes, stream_t stream) {
    const size_t N = (size_t)comm_size(), shard = bytes / N;
    if (!comm.size) return;
    char *all = (char*)values, *mine = all + (size_t)comm_rank() * shard;
    stream_synchronize(stream);
    if (!DEVICE_HAS_OWN_MEMORY) {
        MPI_Datatype block; // counts are ints, and arrays may have more bytes than an int holds
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

// Queues the sums of values (count) over the ranks, for every rank. For small
// counts only: nothing is split into shards.
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

// Makes later work on the stream run after all work that the functions above have queued.
static inline void comm_wait(stream_t stream) { (void)stream; }

// stream_synchronize() that also notices the failure of another rank; with MPI there is nothing to notice.
static inline void comm_synchronize(stream_t stream) { stream_synchronize(stream); }

// Whether a graph can record the functions above: not if the host does their work.
static inline int comm_can_be_recorded(void) { return !comm.size; }

#else

// ----------------------------------------------------------------------------
// NCCL: arrays of the device. The functions queue on comm_nccl.stream, after the work that the caller's
// stream has so far. The caller's stream goes on meanwhile.

typedef struct {
    ncclComm_t ranks;
    cudaStream_t stream;
    cudaEvent_t before, after;
    int pending; // 1: work is queued that comm_wait() has not waited for
} CommNccl;

static CommNccl comm_nccl;

// Fails for an error of NCCL. A remote or system error mostly means that another rank is gone.
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

// Makes comm_nccl.stream wait for the work that `stream` has so far.
static inline void comm_follow(stream_t stream) {
    device_check(cudaEventRecord(comm_nccl.before, stream), "record an event");
    device_check(cudaStreamWaitEvent(comm_nccl.stream, comm_nccl.before, 0), "wait for an event");
    comm_nccl.pending = 1;
}

// The type of the sums: fp32 on a GPU, whatever the parameters' type.
static const ncclDataType_t comm_nccl_type = ncclFloat32;
static_assert(sizeof(float_acc) == 4, "NCCL is told that sums are fp32");

// Queues the sum of values (count) over the ranks. Each rank gets its own shard of the sum;
// the other shards are undefined afterwards.
static inline void comm_reduce_scatter(float_acc* values, size_t count, stream_t stream) {
    const size_t N = (size_t)comm_size(), shard = count / N;
    if (!comm.size) return;
    assert(count % (N * COMM_ALIGNMENT) == 0);
    comm_follow(stream);
    comm_check(ncclReduceScatter(values, values + (size_t)comm_rank() * shard, shard, comm_nccl_type, ncclSum,
                                 comm_nccl.ranks, comm_nccl.stream),
               "add up gradients");
}

// Queues a gather: each rank has its shard of values (bytes), and gets all other shards.
static inline void comm_all_gather(void* values, size_t bytes, stream_t stream) {
    const size_t N = (size_t)comm_size(), shard = bytes / N;
    if (!comm.size) return;
    comm_follow(stream);
    comm_check(ncclAllGather((char*)values + (size_t)comm_rank() * shard, values, shard, ncclUint8,
                             comm_nccl.ranks, comm_nccl.stream),
               "gather shards");
}

// Queues the sums of values (count) over the ranks, for every rank. For small
// counts only: nothing is split into shards.
static inline void comm_all_reduce(float_acc* values, size_t count, stream_t stream) {
    if (!comm.size) return;
    comm_follow(stream);
    comm_check(
        ncclAllReduce(values, values, count, comm_nccl_type, ncclSum, comm_nccl.ranks, comm_nccl.stream),
        "add up numbers");
}

// Makes later work on the stream run after all work that the functions above have queued.
static inline void comm_wait(stream_t stream) {
    if (!comm_nccl.pending)
        return; // while a graph is recorded, the stream must not wait for work that is not part of the graph
    comm_nccl.pending = 0;
    device_check(cudaEventRecord(comm_nccl.after, comm_nccl.stream), "record an event");
    device_check(cudaStreamWaitEvent(stream, comm_nccl.after, 0), "wait for an event");
}

// stream_synchronize() that also notices the failure of another rank: a kernel of NCCL that waits for a rank
// which is gone would never end.
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
        // Any error here comes from another rank.
        comm.of_others = result != ncclSuccess && result != ncclInProgress;
        comm_check(result, "go on with the other ranks");
        comm_be_patient(since);
    }
}

// Whether a graph can record the functions above.
static inline int comm_can_be_recorded(void) { return 1; }

#endif

// ----------------------------------------------------------------------------
// Start and end

// MPI and NCCL may wait for ever while they start and end, for a rank that is not there or on a broken
// network, and the program cannot interrupt them. So an alarm ends the process, and with it the job. The
// thread that waits for signals prints comm_last_words, which the main thread has prepared.
static char comm_last_words[512];

static inline void comm_time_is_over(void) {
    const ssize_t wrote = write(STDERR_FILENO, comm_last_words, strlen(comm_last_words));
    (void)wrote; // an error here cannot be reported
    _exit(1);
}

// This process's rank from the launcher's environment, which is known before
// MPI has started; 0 if there is none.
static inline int comm_launched_rank(void) {
    static const char* const names[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"};
    for (int i = 0; i < 4; i++)
        if (getenv(names[i])) return atoi(getenv(names[i]));
    return 0;
}

// Starts the alarm; comm_watch_end() stops it. The alarms of the first 20 ranks are a second apart, so that
// the first one to ring prints the message and ends the job.
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

// Quarters of a second that this rank waits before it prints a failure. Often all ranks fail for the same
// reason: rank 0 then prints it and ends the others before their turn. Ranks from 20 on take their turn by
// their number on their host. A rank that fails only because another rank failed waits 6 seconds more, so
// that the root cause is printed first, by the failed rank or by the launcher.
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

// Runs at every exit that is no failure. All ranks reach it; rank 0 may come
// later, since it removes old checkpoints.
static inline void comm_stop(void) {
    comm_barrier();
    comm_watch("the end");
    failure_begin = NULL;
    failure_end = NULL;
    comm_stop_device();
    MPI_Finalize();
    comm_watch_end();
}

// Sets the number of OpenMP threads to this rank's equal part of the cores that the job may use on this host.
// mpirun binds a rank to one core, or to the cores of one NUMA node; if that is less than the rank's part,
// this function removes the binding.
static inline void comm_choose_threads(void) {
    cpu_set_t bound, lent;
    if (sched_getaffinity(0, sizeof(bound), &bound) != 0) return;
    memset(&lent, 0xFF, sizeof(lent));
    (void)sched_setaffinity(0, sizeof(lent), &lent); // the system leaves out cores that the job may not use
    if (sched_getaffinity(0, sizeof(lent), &lent) != 0) return;
    const int fair = CPU_COUNT(&lent) / comm_local_size(), threads = fair > 1 ? fair : 1;
    if (CPU_COUNT(&bound) >= threads) (void)sched_setaffinity(0, sizeof(bound), &bound);
    if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(threads);
}

// Raises the limit of open files to its maximum. Between machines every pair of ranks needs one or two files,
// and many systems start with a limit of 1024.
static inline void comm_allow_files(void) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
    files.rlim_cur = files.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &files);
}

// Only rank 0 prints to stdout; the other ranks report a failure on stderr.
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

// All ranks call it in the same order, each with its own value of `what`. It fails on the
// ranks whose value differs from rank 0's.
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
