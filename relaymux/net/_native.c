/*
 * The innermost loops of the data path: what costs per read and per TLS record.
 *
 * An installation without a compiler does the same by other means: PythonBufferPool in
 * relaymux/net/buffers.py, and OpenSSL's own records (relaymux/net/tlsengine.py).
 * relaymux/net/_native.pyi says what the calls mean.  There is no policy here: no limit,
 * no state of a connection, nothing of the protocol, and no cipher.
 *
 * All calls are made with the GIL, and none of them blocks.  A cipher may release the GIL
 * (that of pyca/cryptography does), so nothing that other threads look at may be in a pool's
 * buffers while records are sealed: see `borrowed`.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

/* ---- Memory ----------------------------------------------------------------------- */

/*
 * The memory of a pool.  Buffers that are lent may outlive the pool, so whoever goes
 * last frees it.
 */
typedef struct {
    Py_ssize_t owners; /* the pool, as long as there is one, and each lent buffer */
    Py_ssize_t size;   /* bytes of each buffer */
    Py_ssize_t lent;
    Py_ssize_t idle;
    Py_ssize_t most_idle;
    int has_pool;
    char *free[]; /* the idle ones; the last one returned is the first used again */
} Store;

/* A buffer that is lent: lives as long as any view of it does, and then goes back. */
typedef struct {
    PyObject_HEAD
    Store *store;
    char *memory;
    /* What the view shows that is being made; else all of it. */
    Py_ssize_t start, length;
    int readonly;
} Lent;

typedef struct {
    PyObject_HEAD
    Store *store;
    Lent *current; /* NULL before the first, and when there was no memory for another */
    Py_ssize_t filled;
    int in_use; /* by a call that has not returned */
} Pool;

static PyTypeObject LentType, PoolType;

/*
 * Memory straight from the kernel: the allocator would keep what a burst needed, as its
 * threshold for doing the same rises with the first buffer that is freed.
 */
static char *buffer_new(Py_ssize_t size)
{
#ifdef __SANITIZE_ADDRESS__
    return malloc(size); /* whose ends are watched */
#else
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
#endif
}

static void buffer_free(char *memory, Py_ssize_t size)
{
#ifdef __SANITIZE_ADDRESS__
    free(memory);
#else
    munmap(memory, size);
#endif
}

static void store_disown(Store *store)
{
    if (!--store->owners)
        free(store);
}

static void lent_dealloc(Lent *lent)
{
    Store *store = lent->store;
    store->lent--;
    if (store->has_pool && store->idle < store->most_idle)
        store->free[store->idle++] = lent->memory;
    else
        buffer_free(lent->memory, store->size);
    store_disown(store);
    PyObject_Free(lent);
}

static int lent_getbuffer(Lent *lent, Py_buffer *view, int flags)
{
    return PyBuffer_FillInfo(view, (PyObject *)lent, lent->memory + lent->start, lent->length,
                             lent->readonly, flags);
}

static PyBufferProcs lent_buffer = {.bf_getbuffer = (getbufferproc)lent_getbuffer};

static PyTypeObject LentType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Buffer",
    .tp_basicsize = sizeof(Lent),
    .tp_dealloc = (destructor)lent_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_as_buffer = &lent_buffer,
};

static Lent *lend(Store *store)
{
    char *memory = store->idle ? store->free[--store->idle] : buffer_new(store->size);
    if (!memory) {
        PyErr_NoMemory();
        return NULL;
    }
    Lent *lent = PyObject_New(Lent, &LentType);
    if (!lent) {
        buffer_free(memory, store->size);
        return NULL;
    }
    lent->store = store;
    lent->memory = memory;
    lent->start = 0;
    lent->length = store->size;
    lent->readonly = 1;
    store->owners++;
    store->lent++;
    return lent;
}

/*
 * Calls of a pool are not nested: whatever else runs meanwhile (a finaliser, as making an
 * object may collect garbage; who is asked for more records; a signal's handler) would
 * take away the buffer that is being filled.
 */
static int begin_use(Pool *pool)
{
    if (pool->in_use) {
        PyErr_SetString(PyExc_RuntimeError, "the pool is in use by a call that has not returned");
        return -1;
    }
    pool->in_use = 1;
    return 0;
}

static PyObject *end_use(Pool *pool, PyObject *result)
{
    pool->in_use = 0;
    return result;
}

/* A view of a part, whose `obj` is the whole buffer, as for a slice of a view. */
static PyObject *view_of(Lent *lent, Py_ssize_t start, Py_ssize_t length, int readonly)
{
    lent->start = start;
    lent->length = length;
    lent->readonly = readonly;
    PyObject *view = PyMemoryView_FromObject((PyObject *)lent);
    lent->start = 0;
    lent->length = lent->store->size;
    lent->readonly = 1;
    return view;
}

/*
 * Have at least `minimum` bytes free in the buffer that is being filled.
 * Returns where they begin and sets how many there are; NULL with an exception.
 */
static char *room_in(Pool *pool, Py_ssize_t minimum, Py_ssize_t *length)
{
    Py_ssize_t size = pool->store->size;
    if (!pool->current || size - pool->filled < minimum) {
        /* Given back first: if nobody has a view of it, it is the next one. */
        Py_CLEAR(pool->current);
        if (!(pool->current = lend(pool->store)))
            return NULL;
        pool->filled = 0;
    }
    *length = size - pool->filled;
    return pool->current->memory + pool->filled;
}

/* A view of `count` bytes that were put into the room just asked for. */
static PyObject *take_from(Pool *pool, Py_ssize_t count)
{
    PyObject *view = view_of(pool->current, pool->filled, count, 1);
    if (view)
        pool->filled += count;
    return view;
}

/* The same, appended to a list; nothing is appended for no bytes. */
static int take_into(Pool *pool, Py_ssize_t count, PyObject *list)
{
    if (!count)
        return 0;
    PyObject *view = take_from(pool, count);
    if (!view)
        return -1;
    int failed = PyList_Append(list, view);
    Py_DECREF(view);
    return failed;
}

static PyObject *pool_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"size", "idle", NULL};
    Py_ssize_t size = 256 * 1024, idle = 32;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|nn:BufferPool", names, &size, &idle))
        return NULL;
    if (size < 1 || size > INT_MAX || idle < 0 || idle > 1024 * 1024) {
        PyErr_SetString(PyExc_ValueError, "size or idle out of range");
        return NULL;
    }
    Store *store = malloc(sizeof(Store) + idle * sizeof(char *));
    if (!store)
        return PyErr_NoMemory();
    *store = (Store){.owners = 1, .size = size, .most_idle = idle, .has_pool = 1};
    Pool *pool = (Pool *)type->tp_alloc(type, 0);
    if (!pool) {
        free(store);
        return NULL;
    }
    pool->store = store;
    return (PyObject *)pool;
}

static void pool_dealloc(Pool *pool)
{
    Store *store = pool->store;
    Py_CLEAR(pool->current);
    store->has_pool = 0;
    while (store->idle)
        buffer_free(store->free[--store->idle], store->size);
    store_disown(store);
    Py_TYPE(pool)->tp_free(pool);
}

static int check_minimum(Pool *pool, Py_ssize_t minimum)
{
    if (minimum >= 1 && minimum <= pool->store->size)
        return 0;
    PyErr_Format(PyExc_ValueError, "no buffer of %zd bytes has room for %zd", pool->store->size, minimum);
    return -1;
}

static PyObject *pool_room(Pool *pool, PyObject *args)
{
    Py_ssize_t minimum = 1, length;
    if (!PyArg_ParseTuple(args, "|n:room", &minimum) || check_minimum(pool, minimum))
        return NULL;
    if (begin_use(pool))
        return NULL;
    char *room = room_in(pool, minimum, &length);
    return end_use(pool, room ? view_of(pool->current, pool->filled, length, 0) : NULL);
}

static PyObject *pool_take(Pool *pool, PyObject *argument)
{
    Py_ssize_t count = PyLong_AsSsize_t(argument);
    if (count == -1 && PyErr_Occurred())
        return NULL;
    if (!pool->current || count < 0 || count > pool->store->size - pool->filled) {
        PyErr_SetString(PyExc_ValueError, "more bytes than there was room for");
        return NULL;
    }
    return begin_use(pool) ? NULL : end_use(pool, take_from(pool, count));
}

/* Where a call puts its results: rooms of a pool one after the other, and views of what they hold. */
typedef struct {
    Pool *pool;
    PyObject *views;
    char *room;
    Py_ssize_t length, filled;
} Output;

/* Have `minimum` bytes free.  Returns where they begin; NULL with an exception. */
static unsigned char *output_room(Output *output, Py_ssize_t minimum)
{
    if (output->length - output->filled < minimum) {
        if (take_into(output->pool, output->filled, output->views))
            return NULL;
        output->length = output->filled = 0;
        if (!(output->room = room_in(output->pool, minimum, &output->length)))
            return NULL;
    }
    return (unsigned char *)output->room + output->filled;
}

static PyObject *pool_gather(Pool *pool, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "gather() takes a socket, limit, minimum and again");
        return NULL;
    }
    int fd = PyObject_AsFileDescriptor(args[0]);
    if (fd < 0) {
        if (!PyErr_ExceptionMatches(PyExc_ValueError))
            return NULL;
        PyErr_Clear(); /* it is closed */
        return Py_BuildValue("([]ii)", 0, EBADF);
    }
    Py_ssize_t left = PyLong_AsSsize_t(args[1]), minimum = PyLong_AsSsize_t(args[2]);
    Py_ssize_t again = PyLong_AsSsize_t(args[3]);
    if (PyErr_Occurred() || check_minimum(pool, minimum))
        return NULL;
    Output output = {.pool = pool, .views = PyList_New(0)};
    if (!output.views || begin_use(pool)) {
        Py_XDECREF(output.views);
        return NULL;
    }
    Py_ssize_t total = 0;
    int ended = 0;
    while (left > 0) {
        unsigned char *room = output_room(&output, minimum);
        if (!room)
            goto fail;
        Py_ssize_t space = output.length - output.filled;
        if (space > left)
            space = left;
        ssize_t count = recv(fd, room, space, MSG_DONTWAIT);
        if (count < 0) {
            if (errno == EINTR) {
                if (PyErr_CheckSignals())
                    goto fail;
                continue;
            }
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                ended = errno;
            break;
        }
        if (!count) {
            ended = -1;
            break;
        }
        output.filled += count;
        total += count;
        left -= count;
        if (count < again && count < space)
            break;
    }
    if (take_into(pool, output.filled, output.views))
        goto fail;
    return end_use(pool, Py_BuildValue("(Nni)", output.views, total, ended));
fail:
    Py_DECREF(output.views);
    return end_use(pool, NULL);
}

static PyObject *pool_size(Pool *pool, void *closure)
{
    return PyLong_FromSsize_t(pool->store->size);
}

static PyObject *pool_held_bytes(Pool *pool, void *closure)
{
    return PyLong_FromSsize_t((pool->store->lent + pool->store->idle) * pool->store->size);
}

static PyMethodDef pool_methods[] = {
    {"room", (PyCFunction)pool_room, METH_VARARGS, NULL},
    {"take", (PyCFunction)pool_take, METH_O, NULL},
    {"gather", (PyCFunction)(void (*)(void))pool_gather, METH_FASTCALL, NULL},
    {NULL},
};

static PyGetSetDef pool_attributes[] = {
    {"size", (getter)pool_size, NULL, NULL, NULL},
    {"held_bytes", (getter)pool_held_bytes, NULL, NULL, NULL},
    {NULL},
};

static PyTypeObject PoolType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.BufferPool",
    .tp_basicsize = sizeof(Pool),
    .tp_new = pool_new,
    .tp_dealloc = (destructor)pool_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = pool_methods,
    .tp_getset = pool_attributes,
};

/* ---- TLS 1.3 records (RFC 8446, 5.2) ----------------------------------------------- */

/* The most that one record holds, its header, and what encryption adds: a type and a tag. */
#define RECORD 16384
#define HEADER 5
#define TAG 16
#define SEALED_RECORD (HEADER + RECORD + 1 + TAG)

/* The most that a record may have behind its header (5.2). */
#define CIPHERTEXT (RECORD + 256)

#define NONCE 12

/* A kind of record, and alerts (B.1, B.2). */
enum { APPLICATION_DATA = 23 };
enum { UNEXPECTED_MESSAGE = 10, BAD_RECORD_MAC = 20, RECORD_OVERFLOW = 22 };

/* Shows a cipher whatever memory its owner points it at, so that no record needs objects of its own. */
typedef struct {
    PyObject_HEAD
    void *memory;
    Py_ssize_t length;
    Py_ssize_t shown;
} Window;

static int window_getbuffer(Window *window, Py_buffer *view, int flags)
{
    if (PyBuffer_FillInfo(view, (PyObject *)window, window->memory, window->length, 0, flags))
        return -1;
    window->shown++;
    return 0;
}

static void window_releasebuffer(Window *window, Py_buffer *view)
{
    window->shown--;
}

static PyBufferProcs window_buffer = {
    .bf_getbuffer = (getbufferproc)window_getbuffer,
    .bf_releasebuffer = (releasebufferproc)window_releasebuffer,
};

static PyTypeObject WindowType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Window",
    .tp_basicsize = sizeof(Window),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_as_buffer = &window_buffer,
};

/* The arguments of a cipher, in their order. */
enum { THE_NONCE, THE_INPUT, THE_HEADER, THE_OUTPUT, ARGUMENTS };

/* The records of one direction under one key. */
typedef struct {
    PyObject_HEAD
    PyObject *cipher; /* what encrypts or decrypts into given memory */
    Window *windows[ARGUMENTS];
    unsigned char iv[NONCE], nonce[NONCE];
    unsigned long long records;
    /* Of a Sealer: the plain bytes of the next record.  Of an Opener: a record that is not complete. */
    int filled;
    int in_use; /* by a call that has not returned: a cipher may release the GIL */
    unsigned char record[HEADER + CIPHERTEXT];
} Records;

static void records_dealloc(Records *records)
{
    Py_CLEAR(records->cipher);
    for (int i = 0; i < ARGUMENTS; i++)
        Py_CLEAR(records->windows[i]);
    Py_TYPE(records)->tp_free(records);
}

static PyObject *records_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *cipher;
    const char *iv;
    Py_ssize_t iv_length;
    unsigned long long sent = 0;
    if (!PyArg_ParseTuple(args, "Oy#|K", &cipher, &iv, &iv_length, &sent))
        return NULL;
    if (iv_length != NONCE) {
        PyErr_Format(PyExc_ValueError, "%zd bytes where the nonce has %d", iv_length, NONCE);
        return NULL;
    }
    Records *records = (Records *)type->tp_alloc(type, 0);
    if (!records)
        return NULL;
    records->cipher = Py_NewRef(cipher);
    records->records = sent;
    memcpy(records->iv, iv, NONCE);
    for (int i = 0; i < ARGUMENTS; i++) {
        Window *window = records->windows[i] = PyObject_New(Window, &WindowType);
        if (!window) {
            Py_DECREF(records);
            return NULL;
        }
        window->memory = NULL;
        window->length = window->shown = 0;
    }
    records->windows[THE_NONCE]->memory = records->nonce;
    records->windows[THE_NONCE]->length = NONCE;
    records->windows[THE_HEADER]->length = HEADER;
    return (PyObject *)records;
}

static PyObject *records_count(Records *records, void *closure)
{
    return PyLong_FromUnsignedLongLong(records->records);
}

/*
 * Encrypt or decrypt one record; its header is the additional data (5.2), and its number
 * makes the nonce (5.3).  -1 with an exception.
 */
static int protect(Records *records, void *header, void *input, Py_ssize_t input_length, void *output,
                   Py_ssize_t output_length)
{
    memcpy(records->nonce, records->iv, NONCE);
    unsigned long long number = records->records++;
    for (int i = NONCE - 1; number; i--, number >>= 8)
        records->nonce[i] ^= (unsigned char)number;
    Window **windows = records->windows;
    windows[THE_HEADER]->memory = header;
    windows[THE_INPUT]->memory = input;
    windows[THE_INPUT]->length = input_length;
    windows[THE_OUTPUT]->memory = output;
    windows[THE_OUTPUT]->length = output_length;
    PyObject *count = PyObject_Vectorcall(records->cipher, (PyObject **)windows, ARGUMENTS, NULL);
    if (!count)
        return -1;
    Py_ssize_t done = PyLong_AsSsize_t(count);
    Py_DECREF(count);
    if (done == -1 && PyErr_Occurred())
        return -1;
    if (done != output_length || windows[THE_INPUT]->shown || windows[THE_OUTPUT]->shown) {
        PyErr_SetString(PyExc_RuntimeError, "the cipher did not do as it should, or keeps what it was shown");
        return -1;
    }
    return 0;
}

static int begin_records(Records *records, Pool *pool)
{
    if (records->in_use) {
        PyErr_SetString(PyExc_RuntimeError, "records are being made or read by a call that has not returned");
        return -1;
    }
    if (begin_use(pool))
        return -1;
    records->in_use = 1;
    return 0;
}

static PyObject *end_records(Records *records, Pool *pool, PyObject *result)
{
    records->in_use = 0;
    return end_use(pool, result);
}

static Pool *pool_argument(PyObject *argument)
{
    if (Py_IS_TYPE(argument, &PoolType)) {
        Pool *pool = (Pool *)argument;
        return check_minimum(pool, HEADER + CIPHERTEXT) ? NULL : pool;
    }
    PyErr_SetString(PyExc_TypeError, "the first argument has to be a BufferPool of this module");
    return NULL;
}

/* Encrypt `length` plain bytes; the byte behind them is overwritten by their type. */
static int seal_record(Records *records, unsigned char *plain, int length, int type, Output *output)
{
    unsigned char *room = output_room(output, SEALED_RECORD);
    if (!room)
        return -1;
    int inner = length + 1;
    plain[length] = (unsigned char)type;
    room[0] = APPLICATION_DATA;
    room[1] = room[2] = 3;
    room[3] = (unsigned char)((inner + TAG) >> 8);
    room[4] = (unsigned char)(inner + TAG);
    if (protect(records, room, plain, inner, room + HEADER, inner + TAG))
        return -1;
    output->filled += HEADER + inner + TAG;
    return 0;
}

/*
 * The end of the pool's buffer that a piece is a view of; NULL if it is not, or if records
 * are put into that very buffer: the byte behind the piece may be the first of one.
 */
static const char *end_of_buffer(PyObject *piece, const Pool *output)
{
    PyObject *base = PyMemoryView_Check(piece) ? PyMemoryView_GET_BASE(piece) : NULL;
    if (!base || !Py_IS_TYPE(base, &LentType) || base == (PyObject *)output->current)
        return NULL;
    Lent *lent = (Lent *)base;
    return lent->memory + lent->store->size;
}

/* Encrypt a piece, but for what does not fill a record. */
static int seal_piece(Records *records, const Py_buffer *data, const char *end, int type, Output *output)
{
    char *next = data->buf;
    for (Py_ssize_t left = data->len; left;) {
        if (!records->filled && left >= RECORD && end && next + RECORD < end) {
            /* In place.  The byte behind belongs to the pool, too, and nobody looks at it meanwhile. */
            char borrowed = next[RECORD];
            int failed = seal_record(records, (unsigned char *)next, RECORD, type, output);
            next[RECORD] = borrowed;
            if (failed)
                return -1;
            next += RECORD;
            left -= RECORD;
            continue;
        }
        /* Pieces share records: a frame's header costs none of its own. */
        int part = left < RECORD - records->filled ? (int)left : RECORD - records->filled;
        memcpy(records->record + records->filled, next, part);
        records->filled += part;
        next += part;
        left -= part;
        if (records->filled == RECORD) {
            records->filled = 0;
            if (seal_record(records, records->record, RECORD, type, output))
                return -1;
        }
    }
    return 0;
}

static PyObject *sealer_seal(Records *records, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "seal() takes a pool, buffers and a type");
        return NULL;
    }
    Output output = {.pool = pool_argument(args[0])};
    int type = (int)PyLong_AsLong(args[2]);
    if (!output.pool || PyErr_Occurred())
        return NULL;
    PyObject *pieces = PySequence_Tuple(args[1]);
    output.views = pieces ? PyList_New(0) : NULL;
    if (!output.views || begin_records(records, output.pool)) {
        Py_XDECREF(pieces);
        Py_XDECREF(output.views);
        return NULL;
    }
    int failed = 0;
    records->filled = 0;
    for (Py_ssize_t i = 0; !failed && i < PyTuple_GET_SIZE(pieces); i++) {
        PyObject *piece = PyTuple_GET_ITEM(pieces, i);
        Py_buffer data;
        if ((failed = PyObject_GetBuffer(piece, &data, PyBUF_SIMPLE)))
            break;
        failed = seal_piece(records, &data, end_of_buffer(piece, output.pool), type, &output);
        PyBuffer_Release(&data);
    }
    if (!failed && records->filled)
        failed = seal_record(records, records->record, records->filled, type, &output);
    if (!failed)
        failed = take_into(output.pool, output.filled, output.views);
    Py_DECREF(pieces);
    if (failed)
        Py_CLEAR(output.views);
    return end_records(records, output.pool, output.views);
}

/*
 * The next record of what has arrived: in place, or put together from what several buffers
 * have of it.  Returns NULL if there is no whole one, or `alert` is set.
 */
static unsigned char *next_record(Records *records, unsigned char *data, Py_ssize_t length, Py_ssize_t *used,
                                  int *size, int *alert)
{
    unsigned char *start = data + *used;
    Py_ssize_t left = length - *used;
    int wanted = HEADER;
    for (;;) {
        int whole = !records->filled && left >= wanted;
        if (!whole && records->filled < wanted) {
            Py_ssize_t part = left < wanted - records->filled ? left : wanted - records->filled;
            memcpy(records->record + records->filled, data + *used, part);
            records->filled += (int)part;
            *used += part;
            left -= part;
            if (records->filled < wanted)
                return NULL;
        }
        unsigned char *record = whole ? start : records->record;
        if (wanted > HEADER) {
            if (whole)
                *used += wanted;
            records->filled = 0;
            *size = wanted - HEADER;
            return record;
        }
        int ciphertext = record[3] << 8 | record[4];
        if (record[0] != APPLICATION_DATA || ciphertext <= TAG)
            *alert = UNEXPECTED_MESSAGE;
        else if (ciphertext > CIPHERTEXT)
            *alert = RECORD_OVERFLOW;
        if (*alert)
            return NULL;
        wanted = HEADER + ciphertext;
    }
}

static PyObject *opener_open(Records *records, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "open() takes a pool, what was received, and what a wrong tag raises");
        return NULL;
    }
    Output output = {.pool = pool_argument(args[0])};
    Py_buffer data;
    if (!output.pool || PyObject_GetBuffer(args[1], &data, PyBUF_SIMPLE))
        return NULL;
    PyObject *message = NULL;
    output.views = PyList_New(0);
    if (!output.views || begin_records(records, output.pool)) {
        PyBuffer_Release(&data);
        Py_XDECREF(output.views);
        return NULL;
    }
    Py_ssize_t used = 0;
    int type = 0, alert = 0, size;
    unsigned char *record;
    while (!type && (record = next_record(records, data.buf, data.len, &used, &size, &alert))) {
        int inner = size - TAG;
        unsigned char *room = output_room(&output, CIPHERTEXT);
        if (!room)
            goto fail;
        if (protect(records, record, record + HEADER, size, room, inner)) {
            if (!PyErr_ExceptionMatches(args[2]))
                goto fail;
            PyErr_Clear();
            alert = BAD_RECORD_MAC;
            break;
        }
        if (inner > RECORD + 1) {
            alert = RECORD_OVERFLOW;
            break;
        }
        while (inner && !room[inner - 1])
            inner--; /* padding */
        if (!inner--) {
            alert = UNEXPECTED_MESSAGE;
            break;
        }
        if (room[inner] == APPLICATION_DATA) {
            output.filled += inner;
            continue;
        }
        type = room[inner];
        if (!(message = PyBytes_FromStringAndSize((char *)room, inner)))
            goto fail;
    }
    if (take_into(output.pool, output.filled, output.views))
        goto fail;
    PyBuffer_Release(&data);
    if (!message)
        message = Py_NewRef(Py_None);
    return end_records(records, output.pool, Py_BuildValue("(NniiN)", output.views, used, alert, type, message));
fail:
    PyBuffer_Release(&data);
    Py_XDECREF(message);
    Py_DECREF(output.views);
    return end_records(records, output.pool, NULL);
}

static PyGetSetDef records_attributes[] = {
    {"records", (getter)records_count, NULL, NULL, NULL},
    {NULL},
};

static PyMethodDef sealer_methods[] = {
    {"seal", (PyCFunction)(void (*)(void))sealer_seal, METH_FASTCALL, NULL},
    {NULL},
};

static PyMethodDef opener_methods[] = {
    {"open", (PyCFunction)(void (*)(void))opener_open, METH_FASTCALL, NULL},
    {NULL},
};

/* What the other two have in common; nobody makes one of its own. */
static PyTypeObject RecordsType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Records",
    .tp_basicsize = sizeof(Records),
    .tp_new = records_new,
    .tp_dealloc = (destructor)records_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_getset = records_attributes,
};

static PyTypeObject SealerType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Sealer",
    .tp_base = &RecordsType,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = sealer_methods,
};

static PyTypeObject OpenerType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Opener",
    .tp_base = &RecordsType,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = opener_methods,
};

/* ---- The module ------------------------------------------------------------------- */

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "relaymux.net._native",
    .m_doc = "The innermost loops of the data path, compiled.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__native(void)
{
    if (PyType_Ready(&LentType) || PyType_Ready(&PoolType) || PyType_Ready(&WindowType) ||
        PyType_Ready(&RecordsType) || PyType_Ready(&SealerType) || PyType_Ready(&OpenerType))
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddObjectRef(module, "BufferPool", (PyObject *)&PoolType) ||
                   PyModule_AddObjectRef(module, "Sealer", (PyObject *)&SealerType) ||
                   PyModule_AddObjectRef(module, "Opener", (PyObject *)&OpenerType)))
        Py_CLEAR(module);
    return module;
}
