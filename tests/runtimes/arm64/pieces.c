// Loads ONNX graphs and runs them, as asked through a pipe: the engine under test where Python itself cannot run.
//
//   pieces LIBRARY          (of onnxruntime; its C API is called by the places of its entries, so no header is needed)
//
// Numbers are 32-bit little-endian unless a comment says more; a text is its length and its bytes.
//   request 'L': text path, level of optimisation      answer: text error (empty if none), number of the graph
//   request 'R': graph, count and inputs (text name, tensor), count and names of outputs
//                                                      answer: text error, and if it is empty the outputs
// A tensor is its type (1 float32, 2 uint8, 3 int8, 7 int64), its rank, its extents (64 bits each) and its values.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    ERROR_MESSAGE = 2, CREATE_ENV = 3, CREATE_SESSION = 7, RUN = 9, CREATE_OPTIONS = 10, SET_LOG_LEVEL = 22,
    SET_OPTIMISATION = 23, SET_INTRA_THREADS = 24, CREATE_TENSOR = 49, TENSOR_DATA = 51, ELEMENT_TYPE = 60,
    DIMENSION_COUNT = 61, DIMENSIONS = 62, TYPE_AND_SHAPE = 65, CPU_MEMORY = 69, RELEASE_STATUS = 93, RELEASE_VALUE = 96,
    RELEASE_TYPE_AND_SHAPE = 99, MOST = 256
};
typedef struct { const void *const *(*get_api)(uint32_t); } Base;
typedef struct { char *name; void *value; void *data; } Input;

static const void *const *api;
static void *environment, *memory, *graphs[4096];
static uint32_t graph_count;

#define CALL(entry, types) ((void *(*) types)api[entry])

static void stop(const char *why) { fprintf(stderr, "pieces: %s\n", why); exit(1); }

static void take(void *place, size_t size) {
    if (size && fread(place, size, 1, stdin) != 1) exit(0); // the pipe was closed: the work is done
}

static uint32_t number(void) { uint32_t value; take(&value, 4); return value; }

static char *text(void) {
    uint32_t size = number();
    char *value = malloc(size + 1);
    take(value, size);
    value[size] = 0;
    return value;
}

static void give(const void *place, size_t size) { if (size && fwrite(place, size, 1, stdout) != 1) exit(0); }

static void give_number(uint32_t value) { give(&value, 4); }

// Answers with the status's message; returns whether there was an error.
static int failed(void *status) {
    const char *message = status ? ((const char *(*)(void *))api[ERROR_MESSAGE])(status) : "";
    give_number(strlen(message));
    give(message, strlen(message));
    if (status) ((void (*)(void *))api[RELEASE_STATUS])(status);
    return status != NULL;
}

static void must(void *status) {
    if (status) stop(((const char *(*)(void *))api[ERROR_MESSAGE])(status));
}

static void load(void) {
    char *path = text();
    int level = number();
    void *options, *graph = NULL;
    must(CALL(CREATE_OPTIONS, (void **))(&options));
    must(CALL(SET_INTRA_THREADS, (void *, int))(options, 1));
    must(CALL(SET_LOG_LEVEL, (void *, int))(options, 3));
    must(CALL(SET_OPTIMISATION, (void *, int))(options, level));
    if (!failed(CALL(CREATE_SESSION, (void *, const char *, void *, void **))(environment, path, options, &graph))) {
        if (graph_count == sizeof graphs / sizeof *graphs) stop("too many graphs");
        graphs[graph_count] = graph;
        give_number(graph_count++);
    }
    free(path);
}

static size_t size_of(uint32_t type, const int64_t *extents, uint32_t rank) {
    size_t size = type == 7 ? 8 : type == 1 ? 4 : 1;
    for (uint32_t i = 0; i < rank; i++) size *= extents[i];
    return size;
}

static Input input(void) {
    Input result = {text(), NULL, NULL};
    uint32_t type = number(), rank = number();
    int64_t extents[8];
    if (rank > 8) stop("more than eight dimensions");
    take(extents, 8 * rank);
    size_t size = size_of(type, extents, rank);
    result.data = malloc(size + 1);
    take(result.data, size);
    must(CALL(CREATE_TENSOR, (void *, void *, size_t, const int64_t *, size_t, int, void **))(
        memory, result.data, size, extents, rank, type, &result.value));
    return result;
}

static void give_tensor(void *value) {
    void *info, *data;
    size_t rank;
    int type;
    int64_t extents[8];
    must(CALL(TYPE_AND_SHAPE, (void *, void **))(value, &info));
    must(CALL(ELEMENT_TYPE, (void *, int *))(info, &type));
    must(CALL(DIMENSION_COUNT, (void *, size_t *))(info, &rank));
    if (rank > 8) stop("more than eight dimensions");
    must(CALL(DIMENSIONS, (void *, int64_t *, size_t))(info, extents, rank));
    ((void (*)(void *))api[RELEASE_TYPE_AND_SHAPE])(info);
    must(CALL(TENSOR_DATA, (void *, void **))(value, &data));
    give_number(type);
    give_number(rank);
    give(extents, 8 * rank);
    give(data, size_of(type, extents, rank));
}

static void run(void) {
    uint32_t graph = number(), inputs = number();
    Input given[MOST];
    char *names[MOST], *wanted[MOST];
    void *values[MOST], *outputs[MOST] = {NULL};
    if (graph >= graph_count || inputs > MOST) stop("no such graph, or too many inputs");
    for (uint32_t i = 0; i < inputs; i++) {
        given[i] = input();
        names[i] = given[i].name;
        values[i] = given[i].value;
    }
    uint32_t count = number();
    if (count > MOST) stop("too many outputs");
    for (uint32_t i = 0; i < count; i++) wanted[i] = text();
    int error = failed(CALL(RUN, (void *, void *, char **, void **, size_t, char **, size_t, void **))(
        graphs[graph], NULL, names, values, inputs, wanted, count, outputs));
    void (*release)(void *) = (void (*)(void *))api[RELEASE_VALUE];
    for (uint32_t i = 0; i < count; i++) {
        if (!error) give_tensor(outputs[i]);
        if (outputs[i]) release(outputs[i]);
        free(wanted[i]);
    }
    for (uint32_t i = 0; i < inputs; i++) {
        release(values[i]);
        free(given[i].data);
        free(names[i]);
    }
}

int main(int count, char **arguments) {
    void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    if (!library) stop(dlerror());
    const Base *base = ((const Base *(*)(void))dlsym(library, "OrtGetApiBase"))();
    api = base->get_api(1);
    if (!api) stop("the library has no API of version 1");
    must(CALL(CREATE_ENV, (int, const char *, void **))(3, "pieces", &environment));
    must(CALL(CPU_MEMORY, (int, int, void **))(0, 0, &memory));
    for (;;) {
        char request;
        take(&request, 1);
        if (request == 'L') load();
        else if (request == 'R') run();
        else stop("unknown request");
        fflush(stdout);
    }
}
