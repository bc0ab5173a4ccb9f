/*
 * The innermost loops of the data path: what costs per read and per TLS record.
 *
 * Everything here has a twin in Python that does the same, and is what an installation
 * without a compiler uses: BufferPool in relaymux/net/buffers.py, Records in
 * relaymux/net/tlsengine.py (FastEngine).  relaymux/net/_native.pyi says what the calls
 * mean.  There is no policy here: no limit, no state of a connection, nothing of the
 * protocol.
 *
 * All calls are made with the GIL, and none of them blocks.
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
    PyObject *views = PyList_New(0);
    if (!views || begin_use(pool)) {
        Py_XDECREF(views);
        return NULL;
    }
    char *room = NULL;
    Py_ssize_t length = 0, filled = 0, total = 0;
    int ended = 0;
    while (left > 0) {
        if (length - filled < minimum) {
            if (take_into(pool, filled, views))
                goto fail;
            filled = 0;
            if (!(room = room_in(pool, minimum, &length)))
                goto fail;
        }
        Py_ssize_t space = length - filled < left ? length - filled : left;
        ssize_t count = recv(fd, room + filled, space, MSG_DONTWAIT);
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
        filled += count;
        total += count;
        left -= count;
        if (count < again && count < space)
            break;
    }
    if (take_into(pool, filled, views))
        goto fail;
    return end_use(pool, Py_BuildValue("(Nni)", views, total, ended));
fail:
    Py_DECREF(views);
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

/* ---- TLS records ------------------------------------------------------------------ */

/* The most that one record holds. */
#define RECORD 16384

/* Room to read decrypted bytes and encrypted ones into: with less left of a buffer the next is begun. */
#define RECORD_ROOM (4 * RECORD)

typedef int (*ReadFunction)(void *from, void *room, int size);
typedef int (*WriteFunction)(void *to, const void *data, int size);
typedef int (*ErrorFunction)(void *ssl, int result);

/*
 * One connection's records.  The functions are those of the OpenSSL that pyOpenSSL was
 * built with; whoever made this keeps the connection alive for as long.
 */
typedef struct {
    PyObject_HEAD
    void *ssl, *outgoing;
    ReadFunction ssl_read, bio_read;
    WriteFunction ssl_write;
    ErrorFunction get_error;
    int want_read; /* SSL_ERROR_WANT_READ */
    int small_limit;
    int small_filled;
    char small[RECORD];
} Records;

static PyObject *records_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    unsigned long long ssl, outgoing, ssl_read, ssl_write, get_error, bio_read;
    int want_read, small_limit;
    if (!PyArg_ParseTuple(args, "KKKKKKii:Records", &ssl, &outgoing, &ssl_read, &ssl_write, &get_error,
                          &bio_read, &want_read, &small_limit))
        return NULL;
    if (!ssl || !outgoing || !ssl_read || !ssl_write || !get_error || !bio_read || small_limit < 0 ||
        small_limit >= RECORD) {
        PyErr_SetString(PyExc_ValueError, "an address is missing, or the limit is not that of a small piece");
        return NULL;
    }
    Records *records = (Records *)type->tp_alloc(type, 0);
    if (!records)
        return NULL;
    records->ssl = (void *)(uintptr_t)ssl;
    records->outgoing = (void *)(uintptr_t)outgoing;
    records->ssl_read = (ReadFunction)(uintptr_t)ssl_read;
    records->ssl_write = (WriteFunction)(uintptr_t)ssl_write;
    records->get_error = (ErrorFunction)(uintptr_t)get_error;
    records->bio_read = (ReadFunction)(uintptr_t)bio_read;
    records->want_read = want_read;
    records->small_limit = small_limit;
    return (PyObject *)records;
}

static void records_dealloc(Records *records)
{
    Py_TYPE(records)->tp_free(records);
}

static Pool *pool_argument(PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs == 2 && Py_IS_TYPE(args[0], &PoolType)) {
        Pool *pool = (Pool *)args[0];
        return check_minimum(pool, RECORD_ROOM) ? NULL : pool;
    }
    PyErr_SetString(PyExc_TypeError, "two arguments wanted, the first a BufferPool of this module");
    return NULL;
}

static PyObject *records_read(Records *records, PyObject *const *args, Py_ssize_t nargs)
{
    Pool *pool = pool_argument(args, nargs);
    PyObject *views = pool ? PyList_New(0) : NULL;
    if (!views || begin_use(pool)) {
        Py_XDECREF(views);
        return NULL;
    }
    char *room = NULL;
    Py_ssize_t length = 0, filled = 0;
    int result;
    for (;;) {
        if (filled == length) {
            if (take_into(pool, filled, views))
                goto fail;
            filled = 0;
            if (!(room = room_in(pool, RECORD_ROOM, &length)))
                goto fail;
        }
        result = records->ssl_read(records->ssl, room + filled, (int)(length - filled));
        if (result > 0) {
            filled += result;
            continue;
        }
        if (records->get_error(records->ssl, result) != records->want_read)
            break;
        /* It has read all it was given. */
        PyObject *answer = PyObject_CallNoArgs(args[1]);
        int has_more = answer ? PyObject_IsTrue(answer) : -1;
        Py_XDECREF(answer);
        if (has_more < 0)
            goto fail;
        if (!has_more) {
            result = 1;
            break;
        }
    }
    if (take_into(pool, filled, views))
        goto fail;
    return end_use(pool, Py_BuildValue("(Ni)", views, result));
fail:
    Py_DECREF(views);
    return end_use(pool, NULL);
}

/* Encrypt what was put aside as small.  Returns what SSL_write said; 1 if there is nothing. */
static int write_small(Records *records)
{
    int filled = records->small_filled;
    records->small_filled = 0;
    return filled ? records->ssl_write(records->ssl, records->small, filled) : 1;
}

/* Encrypt one piece, or put it aside.  Returns what SSL_write said. */
static int write_piece(Records *records, const char *data, Py_ssize_t left)
{
    if (records->small_filled && left > RECORD - records->small_filled) {
        /* What is small leaves in a full record, with the beginning of what follows. */
        int part = RECORD - records->small_filled;
        memcpy(records->small + records->small_filled, data, part);
        records->small_filled = RECORD;
        data += part;
        left -= part;
        int result = write_small(records);
        if (result <= 0)
            return result;
    }
    if (records->small_filled || left <= records->small_limit) {
        memcpy(records->small + records->small_filled, data, left);
        records->small_filled += (int)left;
        return 1;
    }
    while (left) {
        int part = left < INT_MAX ? (int)left : INT_MAX;
        int result = records->ssl_write(records->ssl, data, part);
        if (result <= 0)
            return result;
        data += result;
        left -= result;
    }
    return 1;
}

static PyObject *records_write(Records *records, PyObject *const *args, Py_ssize_t nargs)
{
    Pool *pool = pool_argument(args, nargs);
    if (!pool)
        return NULL;
    PyObject *pieces = PySequence_Tuple(args[1]);
    PyObject *views = pieces ? PyList_New(0) : NULL;
    if (!views || begin_use(pool)) {
        Py_XDECREF(pieces);
        Py_XDECREF(views);
        return NULL;
    }
    int result = 1;
    records->small_filled = 0;
    for (Py_ssize_t i = 0; result > 0 && i < PyTuple_GET_SIZE(pieces); i++) {
        Py_buffer data;
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(pieces, i), &data, PyBUF_SIMPLE))
            goto fail;
        result = write_piece(records, data.buf, data.len);
        PyBuffer_Release(&data);
    }
    if (result > 0)
        result = write_small(records);
    while (result > 0) {
        Py_ssize_t length;
        char *room = room_in(pool, RECORD_ROOM, &length);
        if (!room)
            goto fail;
        int count = records->bio_read(records->outgoing, room, (int)length);
        if (count <= 0)
            break;
        if (take_into(pool, count, views))
            goto fail;
        if (count < length)
            break;
    }
    Py_DECREF(pieces);
    return end_use(pool, Py_BuildValue("(Ni)", views, result));
fail:
    Py_DECREF(pieces);
    Py_DECREF(views);
    return end_use(pool, NULL);
}

static PyMethodDef records_methods[] = {
    {"read", (PyCFunction)(void (*)(void))records_read, METH_FASTCALL, NULL},
    {"write", (PyCFunction)(void (*)(void))records_write, METH_FASTCALL, NULL},
    {NULL},
};

static PyTypeObject RecordsType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Records",
    .tp_basicsize = sizeof(Records),
    .tp_new = records_new,
    .tp_dealloc = (destructor)records_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = records_methods,
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
    if (PyType_Ready(&LentType) || PyType_Ready(&PoolType) || PyType_Ready(&RecordsType))
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddObjectRef(module, "BufferPool", (PyObject *)&PoolType) ||
                   PyModule_AddObjectRef(module, "Records", (PyObject *)&RecordsType)))
        Py_CLEAR(module);
    return module;
}
