/* NVIDIA's driver library, libcuda.so.1, as far as Triton 3.6 to 3.9 need it: a GPU of compute capability 9.0 that is not there.

   A launch is checked as the driver's documentation says and kept, not run: the function, the configuration, the bytes of every
   parameter. How many parameters a function has, and of what size, is read from its binary, as the driver does. Memory is the
   host's. cuGetErrorString tells why something was refused. */

#include <elf.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { KEPT = 64, PARAMETERS = 64, BYTES = 2048, SHARED = 232448, SHARED_UNLESS_ASKED = 49152 };

struct CUfunc_st {
    char name[128];
    unsigned count, size[PARAMETERS]; /* of the parameters */
    unsigned threads[3];              /* of a block, if the binary demands it */
    int shared;                       /* the most that a launch may ask for */
};

/* In this order and with these types in pretended_driver.py, too. */
struct launch {
    uint64_t function, stream;
    const char *name;
    unsigned grid[3], block[3], shared;
    unsigned attributes, attribute[4][4]; /* their number; of each its kind and the first words of its value */
    unsigned count, size[PARAMETERS];
    unsigned char bytes[BYTES];
};

struct launch launches[KEPT]; /* the latest ones: the n-th, from 0, is in n % KEPT */
unsigned launched;

static const char *reason = "";
static int context;

#define REFUSE_IF(condition) \
    if (condition) { \
        reason = #condition; \
        return CUDA_ERROR_INVALID_VALUE; \
    }

/* --- The device --- */

CUresult cuGetErrorString(CUresult error, const char **text) { *text = reason; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *current) { *current = (CUcontext)&context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice device) { return cuCtxGetCurrent(made); }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute asked, CUdevice device) {
    switch (asked) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1; /* clocks and widths */
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute asked, CUdeviceptr pointer) {
    REFUSE_IF(asked != CU_POINTER_ATTRIBUTE_DEVICE_POINTER);
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

/* --- Functions --- */

/* Entries of a section .nv.info.NAME: a byte of format, one of kind, and two that are the value or the size of what follows. */
static void read_parameters(CUfunction function, const unsigned char *entry, const unsigned char *end) {
    enum { FOLLOWS = 0x04, THREADS = 0x10, PARAMETER = 0x17 };
    while (entry < end) {
        uint16_t size, ordinal;
        uint32_t packed;
        memcpy(&size, entry + 2, 2);
        if (entry[0] == FOLLOWS && entry[1] == THREADS)
            memcpy(function->threads, entry + 4, sizeof function->threads);
        if (entry[0] == FOLLOWS && entry[1] == PARAMETER) {
            memcpy(&ordinal, entry + 8, 2);
            memcpy(&packed, entry + 12, 4);
            function->count += 1;
            if (ordinal < PARAMETERS)
                function->size[ordinal] = packed >> 18;
        }
        entry += 4 + (entry[0] == FOLLOWS ? size : 0);
    }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    static const char prefix[] = ".nv.info.";
    const unsigned char *file = image;
    const Elf64_Ehdr *header = image;
    REFUSE_IF(memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_ident[EI_CLASS] != ELFCLASS64);
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(file + header->e_shoff);
    CUfunction function = NULL;
    for (int i = 0; i < header->e_shnum; i++) {
        const char *name = (const char *)file + sections[header->e_shstrndx].sh_offset + sections[i].sh_name;
        if (strncmp(name, prefix, sizeof prefix - 1) != 0)
            continue;
        REFUSE_IF(function != NULL /* more than one function */);
        function = calloc(1, sizeof *function);
        function->shared = SHARED_UNLESS_ASKED;
        strncpy(function->name, name + sizeof prefix - 1, sizeof function->name - 1);
        read_parameters(function, file + sections[i].sh_offset, file + sections[i].sh_offset + sections[i].sh_size);
    }
    REFUSE_IF(function == NULL || function->count < 2 /* Triton adds two of its own */ || function->count > PARAMETERS);
    *module = (CUmodule)function;
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; } /* launches that were kept name its function */

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)module;
    REFUSE_IF(strcmp((*function)->name, name) != 0);
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute asked, CUfunction function) {
    *value = asked == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute asked, int value) {
    REFUSE_IF(asked > CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE /* as drivers do that are older than what asks */);
    if (asked == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        REFUSE_IF(value > SHARED);
        function->shared = value;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = CU_STREAM_CAPTURE_STATUS_NONE; return CUDA_SUCCESS; }

/* --- Launches --- */

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    REFUSE_IF(grid[0] - 1 >= INT32_MAX || grid[1] - 1 >= 65535 || grid[2] - 1 >= 65535);
    REFUSE_IF(block[0] * block[1] * block[2] - 1 >= 1024);
    REFUSE_IF(function->threads[0] && memcmp(block, function->threads, sizeof block) != 0);
    REFUSE_IF(config->sharedMemBytes > (unsigned)function->shared);
    REFUSE_IF(config->numAttrs > 4 || extra != NULL);
    struct launch *kept = &launches[launched++ % KEPT];
    memset(kept, 0, offsetof(struct launch, bytes));
    kept->function = (uint64_t)function;
    kept->stream = (uint64_t)config->hStream;
    kept->name = function->name;
    memcpy(kept->grid, grid, sizeof grid);
    memcpy(kept->block, block, sizeof block);
    kept->shared = config->sharedMemBytes;
    kept->attributes = config->numAttrs;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        kept->attribute[i][0] = config->attrs[i].id;
        memcpy(&kept->attribute[i][1], &config->attrs[i].value, 3 * sizeof(unsigned));
    }
    kept->count = function->count;
    memcpy(kept->size, function->size, sizeof kept->size);
    unsigned offset = 0;
    for (unsigned i = 0; i < function->count; offset += function->size[i++]) {
        REFUSE_IF(function->size[i] == 0 || offset + function->size[i] > BYTES);
        memcpy(kept->bytes + offset, parameters[i], function->size[i]);
    }
    return CUDA_SUCCESS;
}

/* Checked as the documentation says; the map holds the arguments. */
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *size, const cuuint64_t *stride,
    const cuuint32_t *box, const cuuint32_t *step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill
) {
    static const unsigned char bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    REFUSE_IF((uintptr_t)map % 64 != 0);
    REFUSE_IF((unsigned)type >= sizeof bytes_of /* and those of less than a byte */);
    REFUSE_IF(rank == 0 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE /* Triton's */);
    REFUSE_IF(address == NULL || (uintptr_t)address % 16 != 0);
    const uint64_t row = (uint64_t)box[0] * bytes_of[type];
    REFUSE_IF(row % 16 != 0);
    REFUSE_IF(swizzle > CU_TENSOR_MAP_SWIZZLE_128B_ATOM_64B);
    REFUSE_IF(swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && row > (swizzle < 3 ? 16u << swizzle : 128));
    REFUSE_IF(promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B || fill > CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA);
    REFUSE_IF(fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && type < CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
    struct {
        uint64_t address, of_triton; /* which clears a bit of it for some drivers */
        uint64_t size[5], stride[4];
        uint16_t box[5], step[5];
        uint8_t type, rank, swizzle, promotion_and_fill;
    } kept = {(uint64_t)address, .type = type, .rank = rank, .swizzle = swizzle, .promotion_and_fill = promotion + 4 * fill};
    _Static_assert(sizeof kept <= sizeof *map, "");
    for (unsigned i = 0; i < rank; i++) {
        REFUSE_IF(size[i] == 0 || size[i] > 1ull << 32);
        REFUSE_IF(box[i] == 0 || box[i] > 256);
        REFUSE_IF(step[i] == 0 || step[i] > 8);
        kept.size[i] = size[i], kept.box[i] = box[i], kept.step[i] = step[i];
        if (i + 1 < rank) {
            REFUSE_IF(stride[i] % 16 != 0 || stride[i] >= 1ull << 40);
            REFUSE_IF(stride[i] < (i == 0 ? size[0] * bytes_of[type] : stride[i - 1] * size[i]));
            kept.stride[i] = stride[i];
        }
    }
    memset(map, 0, sizeof *map);
    memcpy(map, &kept, sizeof kept);
    return CUDA_SUCCESS;
}
