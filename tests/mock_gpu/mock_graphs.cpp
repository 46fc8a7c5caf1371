// Stream capture without a GPU. What a capturing stream is given becomes nodes of a graph, and a replay is one launch.
// Kernels do nothing here, so neither does a replay; but what CUDA forbids during a capture fails as on a GPU: waits,
// and calls such as cudaMalloc in the capturing thread (in all threads under the mode "global").
#include "mock_graphs.h"
#include <atomic>
#include <map>
#include <mutex>
struct CUgraph_st {
    long nodes;
};
struct CUgraphExec_st {
    long nodes;
};
struct Capture {
    unsigned long long id;
    cudaStreamCaptureMode mode;
    long thread;
    cudaGraph_t graph;
    bool valid;
};
static std::atomic<int> active{0};  // captures under way: nothing is looked up without one
static std::atomic<long> nodes{0}, replays{0}, captures{0}, outside{0}, threads{0};
static std::mutex mu;
static std::map<cudaStream_t, Capture> capturing;
static std::map<cudaEvent_t, unsigned long long> recorded;  // events of a capture
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static thread_local long thread = ++threads;
API long mock_graph_count(int which) {  // kernels captured, replays, captures, launches past a capture of this thread
    std::atomic<long>* all[] = {&nodes, &replays, &captures, &outside};
    return *all[which];
}
static Capture* of(cudaStream_t stream) {
    auto it = capturing.find(stream);
    return it == capturing.end() ? nullptr : &it->second;
}
bool mock_captured(cudaStream_t stream, bool kernel) {
    if (!active) return false;
    std::lock_guard<std::mutex> lock(mu);
    if (Capture* capture = of(stream)) {
        capture->graph->nodes++;
        if (kernel) nodes++;
        return true;
    }
    if (kernel)
        for (auto& other : capturing)
            if (other.second.thread == thread) outside++;
    return false;
}
cudaError_t mock_unsafe() {
    if (!active || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    std::lock_guard<std::mutex> lock(mu);
    for (auto& entry : capturing) {
        Capture& capture = entry.second;
        bool own = capture.thread == thread && capture.mode != cudaStreamCaptureModeRelaxed;
        bool others = capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
        if (own || others) {
            capture.valid = false;
            return cudaErrorStreamCaptureUnsupported;
        }
    }
    return cudaSuccess;
}
cudaError_t mock_wait(cudaStream_t stream, bool device) {
    if (!active) return cudaSuccess;
    std::lock_guard<std::mutex> lock(mu);
    Capture* capture = device && !capturing.empty() ? &capturing.begin()->second : of(stream);
    if (!capture) return cudaSuccess;
    capture->valid = false;
    return cudaErrorStreamCaptureUnsupported;
}
void mock_record(cudaEvent_t event, cudaStream_t stream) {
    if (!active && recorded.empty()) return;
    std::lock_guard<std::mutex> lock(mu);
    recorded.erase(event);
    if (Capture* capture = of(stream)) recorded[event] = capture->id;
}
void mock_join(cudaStream_t stream, cudaEvent_t event) {  // a stream that waits for a captured event is captured, too
    if (!active) return;
    std::lock_guard<std::mutex> lock(mu);
    auto it = recorded.find(event);
    if (it == recorded.end() || of(stream)) return;
    for (auto& entry : capturing)
        if (entry.second.id == it->second) {
            Capture joined = entry.second;
            capturing[stream] = joined;
            return;
        }
}
cudaError_t mock_ask(cudaEvent_t event) {
    if (!active) return cudaSuccess;
    std::lock_guard<std::mutex> lock(mu);
    return recorded.count(event) ? cudaErrorCapturedEvent : cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    std::lock_guard<std::mutex> lock(mu);
    if (!stream || of(stream)) return cudaErrorIllegalState;
    capturing[stream] = {(unsigned long long)++captures, mode, thread, new CUgraph_st{0}, true};
    active = capturing.size();
    return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    std::lock_guard<std::mutex> lock(mu);
    Capture* capture = of(stream);
    if (!capture) return cudaErrorIllegalState;
    Capture ended = *capture;
    for (auto it = capturing.begin(); it != capturing.end();)
        it = it->second.id == ended.id ? capturing.erase(it) : std::next(it);
    active = capturing.size();
    *graph = ended.valid ? ended.graph : nullptr;
    return ended.valid ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
}
static cudaStreamCaptureStatus status_of(Capture* capture) {
    if (!capture) return cudaStreamCaptureStatusNone;
    return capture->valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    if (!active) return cudaSuccess;
    std::lock_guard<std::mutex> lock(mu);
    *status = status_of(of(stream));
    return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                         const cudaGraphEdgeData** edges, size_t* count) {
    std::lock_guard<std::mutex> lock(mu);
    Capture* capture = active ? of(stream) : nullptr;
    *status = status_of(capture);
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture ? capture->graph : nullptr;
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(thread_mode, *mode);
    return cudaSuccess;
}
API cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
                                                    unsigned) {
    return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
    *count = graph->nodes;
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    *exec = new CUgraphExec_st{graph->nodes};
    return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
    replays++;
    mock_launch(stream);
    return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
    *object = (cudaUserObject_t)0x1000;
    return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }
