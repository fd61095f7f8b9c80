/*
Streams and events, and graphs that are recorded from streams, with CUDA's names.

    cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    ...                                                  // launches, copies and memsets: noted, not run
    cudaStreamEndCapture(stream, &graph);
    cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphLaunch(executable, stream);                 // runs them, in the order in which they were noted

Nothing runs concurrently. On a stream that does not record, work is complete when the call that queues it
returns. On a stream that records, the work is noted with the values of its arguments; a copy reads its source
when the graph runs.

While a stream records, calls that a GPU refuses are errors here too, with a message, and the recording is
lost. These are host synchronisation with the stream or the device, allocating or freeing memory, copies that
the host waits for (such as those of memory that is not pinned), and an end of the recording before it has
waited for all streams that joined it. Only one recording at a time is possible; a GPU can make several.
*/
#ifndef DEV_SIMT_STREAM_H
#define DEV_SIMT_STREAM_H

#include <functional>
#include <time.h>
#include <vector>
#include "dev/simt/errors.h"

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum { cudaEventRecordDefault = 0, cudaEventRecordExternal = 1 };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal = 0,
    cudaStreamCaptureModeThreadLocal = 1,
    cudaStreamCaptureModeRelaxed = 2
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone = 0,
    cudaStreamCaptureStatusActive = 1,
    cudaStreamCaptureStatusInvalidated = 2
};
enum cudaGraphExecUpdateResult {
    cudaGraphExecUpdateSuccess = 0,
    cudaGraphExecUpdateErrorTopologyChanged = 2,
    cudaGraphExecUpdateErrorNodeTypeChanged = 3
};

namespace simt {

enum NodeKind { NODE_KERNEL, NODE_COPY, NODE_SET, NODE_EVENT };

struct Node {
    NodeKind kind;
    std::function<cudaError_t()> work;
};

} // namespace simt

struct simt_stream {
    bool blocking;      // it and the default stream wait for each other
    unsigned recording; // number of the last recording that it joined
    size_t noted;       // number of its nodes in that recording
    size_t awaited;     // number of these nodes for which another stream waits
};
struct simt_event {
    double milliseconds;
    unsigned recording;  // the event is a place in this recording and has no time; 0: it has a time
    simt_stream* stream; // the stream on which it was recorded
    size_t noted;        // number of the stream's nodes before it
};
struct simt_graph {
    std::vector<simt::Node> nodes;
};
struct simt_graph_exec {
    std::vector<simt::Node> nodes;
};
typedef simt_stream* cudaStream_t;
typedef simt_event* cudaEvent_t;
typedef simt_graph* cudaGraph_t;
typedef simt_graph_exec* cudaGraphExec_t;
struct cudaGraphExecUpdateResultInfo {
    cudaGraphExecUpdateResult result;
};

// ----------------------------------------------------------------------------
// The current recording

namespace simt {

struct Recording {
    unsigned number;   // number of the newest recording
    cudaGraph_t graph; // null: no stream records now
    cudaStream_t origin;
    std::vector<cudaStream_t> joined; // all streams except the origin
    cudaStreamCaptureMode mode;
    bool lost;
};
inline Recording recording;

inline bool records(cudaStream_t stream) {
    return recording.graph && stream && stream->recording == recording.number;
}

// Handles a call that cannot be recorded. cudaGetErrorString() returns its message for every later call of
// this recording.
inline cudaError_t lose_recording(cudaError_t error, const char* call, const char* why) {
    if (recording.lost) return result(cudaErrorStreamCaptureInvalidated);
    recording.lost = true;
    return result(error, "%s while a stream is recorded for a graph: %s", call, why);
}

// For calls that are not allowed during a recording. If there is a recording, it is lost and this returns
// true.
inline bool loses_recording(const char* call) {
    if (!recording.graph || recording.mode == cudaStreamCaptureModeRelaxed) return false;
    lose_recording(cudaErrorStreamCaptureUnsupported, call, "it cannot be part of one");
    return true;
}

// Runs the work, or notes it if the stream records.
template <class Work> inline cudaError_t enqueue(cudaStream_t stream, NodeKind kind, Work work) {
    if (!stream && recording.graph && recording.origin->blocking)
        return lose_recording(cudaErrorStreamCaptureImplicit, "work on the default stream",
                              "it would have to wait for that stream");
    if (!records(stream)) return work();
    if (recording.lost) return result(cudaErrorStreamCaptureInvalidated);
    recording.graph->nodes.push_back({kind, work});
    stream->noted++;
    return cudaSuccess;
}

inline void join_recording(cudaStream_t stream) {
    stream->recording = recording.number;
    stream->noted = stream->awaited = 0;
}

} // namespace simt

// ----------------------------------------------------------------------------
// Streams

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    *stream = new simt_stream();
    (*stream)->blocking = flags != cudaStreamNonBlocking;
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (!simt::records(stream)) return cudaSuccess;
    return simt::lose_recording(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize",
                                "nothing that is recorded has been done");
}
inline cudaError_t cudaDeviceSynchronize() {
    if (simt::recording.graph)
        return simt::lose_recording(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize",
                                    "nothing that is recorded has been done");
    return cudaSuccess;
}

// A stream joins a recording when it waits for an event of a stream that records.
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0) {
    (void)flags;
    const bool recorded = simt::recording.graph && event->recording == simt::recording.number;
    if (!recorded && simt::records(stream))
        return simt::lose_recording(cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent",
                                    "the event is not of the recording");
    if (!recorded || event->stream == stream) return cudaSuccess;
    if (!simt::records(stream)) {
        if (!stream)
            return simt::lose_recording(cudaErrorStreamCaptureImplicit, "cudaStreamWaitEvent",
                                        "the default stream cannot take part in it");
        simt::join_recording(stream);
        simt::recording.joined.push_back(stream);
    }
    if (event->noted > event->stream->awaited) event->stream->awaited = event->noted;
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// Events

inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
    *event = new simt_event();
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}

namespace simt {

inline cudaError_t take_time(cudaEvent_t event) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->milliseconds = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
    event->recording = 0;
    return cudaSuccess;
}

inline cudaError_t check_has_time(cudaEvent_t event) {
    if (!event->recording) return cudaSuccess;
    return result(cudaErrorCapturedEvent, "the event is a place in a recording and has no time: record it by "
                                          "cudaEventRecordExternal");
}

} // namespace simt

// On a stream that records: without cudaEventRecordExternal the event is a place in the recording, for which
// other streams can wait; with it, the event takes the time whenever the graph runs.
inline cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    const bool external = flags == cudaEventRecordExternal;
    if (external && !simt::records(stream))
        return simt::result(cudaErrorInvalidValue,
                            "cudaEventRecordExternal: of a stream that is recorded for a graph only");
    if (external || !simt::records(stream))
        return simt::enqueue(stream, simt::NODE_EVENT, [event] { return simt::take_time(event); });
    event->recording = simt::recording.number;
    event->stream = stream;
    event->noted = stream->noted;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr) {
    return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) { return simt::check_has_time(event); }
inline cudaError_t cudaEventQuery(cudaEvent_t event) { return simt::check_has_time(event); }
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    if (simt::check_has_time(begin) != cudaSuccess || simt::check_has_time(end) != cudaSuccess)
        return cudaErrorCapturedEvent;
    *milliseconds = (float)(end->milliseconds - begin->milliseconds);
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// Graphs

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    if (!stream)
        return simt::result(cudaErrorStreamCaptureUnsupported,
                            "cudaStreamBeginCapture: the default stream cannot be recorded");
    if (simt::recording.graph)
        return simt::result(cudaErrorIllegalState, "cudaStreamBeginCapture: a stream is recorded already");
    const unsigned number = simt::recording.number + 1;
    simt::recording = {number, new simt_graph(), stream, {}, mode, false};
    simt::join_recording(stream);
    return cudaSuccess;
}

inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = nullptr;
    if (!simt::records(stream) || stream != simt::recording.origin)
        return simt::result(cudaErrorStreamCaptureUnmatched,
                            "cudaStreamEndCapture: no recording began on this stream");
    cudaError_t error = simt::recording.lost ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
    for (cudaStream_t other : simt::recording.joined)
        if (error == cudaSuccess && other->awaited < other->noted)
            error = simt::lose_recording(cudaErrorStreamCaptureUnjoined, "cudaStreamEndCapture",
                                         "nobody waits for all of a stream that joined it");
    if (error == cudaSuccess) *graph = simt::recording.graph;
    else delete simt::recording.graph;
    simt::recording.graph = nullptr;
    return simt::result(error);
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    *status = !simt::records(stream) ? cudaStreamCaptureStatusNone
              : simt::recording.lost ? cudaStreamCaptureStatusInvalidated
                                     : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                        unsigned long long flags = 0) {
    (void)flags;
    *executable = new simt_graph_exec{graph->nodes};
    return cudaSuccess;
}

// Replaces the arguments of the same work. Different work needs another executable.
inline cudaError_t cudaGraphExecUpdate(cudaGraphExec_t executable, cudaGraph_t graph,
                                       cudaGraphExecUpdateResultInfo* info) {
    const size_t had = executable->nodes.size(), has = graph->nodes.size();
    info->result = had == has ? cudaGraphExecUpdateSuccess : cudaGraphExecUpdateErrorTopologyChanged;
    for (size_t i = 0; i < has && info->result == cudaGraphExecUpdateSuccess; i++)
        if (executable->nodes[i].kind != graph->nodes[i].kind)
            info->result = cudaGraphExecUpdateErrorNodeTypeChanged;
    if (info->result != cudaGraphExecUpdateSuccess)
        return simt::result(cudaErrorGraphExecUpdateFailure,
                            "cudaGraphExecUpdate: a graph of other nodes, %zu where %zu were", has, had);
    executable->nodes = graph->nodes;
    return cudaSuccess;
}

inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    if (simt::records(stream))
        return simt::lose_recording(cudaErrorStreamCaptureUnsupported, "cudaGraphLaunch",
                                    "the emulator knows no graphs in graphs");
    for (const simt::Node& node : executable->nodes) {
        const cudaError_t error = node.work();
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    return cudaSuccess;
}

#endif
