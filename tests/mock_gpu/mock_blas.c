#include <stdlib.h>
#include <string.h>
extern void mock_gemm(void* stream);
#define V __attribute__((visibility("default")))
#define GEMM(name)                       \
    V int name(void** handle) {          \
        mock_gemm(*handle); /* stream */ \
        return 0;                        \
    }
#define NOP(name) \
    V int name() { return 0; }
V int cublasCreate_v2(void** h) {
    *h = calloc(1, 64);
    return 0;
}
NOP(cublasDestroy_v2)
V int cublasSetStream_v2(void** handle, void* stream) {
    *handle = stream;
    return 0;
}
NOP(cublasSetWorkspace_v2) NOP(cublasSetMathMode) NOP(cublasSetPointerMode_v2)
    NOP(cublasSetSmCountTarget) V int cublasGetMathMode(void* h, int* m) {
    *m = 0;
    return 0;
}
V int cublasGetPointerMode_v2(void* h, int* m) {
    *m = 0;
    return 0;
}
GEMM(cublasGemmEx)
GEMM(cublasGemmStridedBatchedEx) GEMM(cublasSgemm_v2) GEMM(cublasSgemmStridedBatched) GEMM(cublasSgemmEx)
    GEMM(cublasSgemv_v2) GEMM(cublasSdot_v2) GEMM(cublasDotEx) GEMM(cublasDgemm_v2) V int cublasLtCreate(void** h) {
    *h = malloc(64);
    return 0;
}
V int cublasLtMatmulDescCreate(void** d, ...) {
    *d = malloc(64);
    return 0;
}
V int cublasLtMatmulPreferenceCreate(void** d) {
    *d = malloc(64);
    return 0;
}
V int cublasLtMatrixLayoutCreate(void** d, ...) {
    *d = malloc(64);
    return 0;
}
NOP(cublasLtMatmulDescDestroy)
NOP(cublasLtMatmulDescSetAttribute) NOP(cublasLtMatmulPreferenceDestroy) NOP(cublasLtMatmulPreferenceSetAttribute)
    NOP(cublasLtMatrixLayoutDestroy) NOP(cublasLtMatrixLayoutSetAttribute) V
    int cublasLtMatmul(void* h, void* d, void* alpha, void* a, void* la, void* b, void* lb, void* beta, void* c,
                       void* lc, void* out, void* lo, void* algo, void* work, size_t size, void* stream) {
    mock_gemm(stream);
    return 0;
}
V int cublasLtMatmulAlgoGetHeuristic(void* h, void* op, void* a, void* b, void* c, void* d, void* pref, int n,
                                       char* results, int* count) {
    memset(results, 0, 96);
    *count = 1;
    return 0;
}
V int ncclGetUniqueId(char* id) {
    memset(id, 7, 128);
    return 0;
}
V int ncclCommInitRankConfig(void** c, ...) {
    *c = malloc(64);
    return 0;
}
V int ncclCommInitRank(void** c, ...) {
    *c = malloc(64);
    return 0;
}
V int ncclCommInitRankScalable(void** c, ...) {
    *c = malloc(64);
    return 0;
}
V int ncclCommGetAsyncError(void* c, int* e) {
    *e = 0;
    return 0;
}
NOP(ncclAllReduce)
NOP(ncclAllGather) NOP(ncclBroadcast) NOP(ncclBcast) NOP(ncclReduce) NOP(ncclReduceScatter) NOP(ncclSend)
    NOP(ncclRecv) NOP(ncclGather) NOP(ncclGroupStart) NOP(ncclGroupEnd) NOP(ncclCommDestroy) NOP(ncclCommAbort)
        NOP(ncclCommFinalize) NOP(ncclCommRegister) NOP(ncclCommDeregister)
