/*
 * The innermost loops of the data path: what costs per read.  Those per TLS record are in _sealing.c and
 * _opening.c, and _fastpath.c does without Python.
 *
 * An installation without a compiler does the same by other means: PythonBufferPool in
 * relaymux/net/buffers.py, and OpenSSL's own records (relaymux/net/tlsengine.py).
 * relaymux/net/_native.pyi says what the calls mean.  There is no policy here: no limit,
 * no state of a connection, nothing of the protocol, and no cipher.
 *
 * All calls are made with the GIL, and none of them blocks.
 */

#include "_native.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>

/*
 * Memory straight from the kernel: the allocator would keep what a burst needed, as its
 * threshold for doing the same rises with the first buffer that is freed.  All of it is
 * going to be used, and to have it at once costs half of what a fault for each page does.
 */
static char *buffer_new(Py_ssize_t size)
{
#ifdef __SANITIZE_ADDRESS__
    return malloc(size); /* whose ends are watched */
#else
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
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
    if (!--store->owners) {
        free(store->free);
        free(store);
    }
}

/*
 * Keep an idle buffer for the next need.  On a long line many come back at once, with an acknowledgement, and
 * as many are needed right behind that: as many as are lent are kept, and what was lent in a burst goes.
 */
static void store_keep(Store *store, char *memory)
{
    Py_ssize_t most = store->lent > store->least_idle ? store->lent : store->least_idle;
    while (store->idle > most)
        buffer_free(store->free[--store->idle], store->size);
    if (store->idle == store->places && store->idle < most) {
        Py_ssize_t places = 2 * store->places > most ? 2 * store->places : most;
        char **more = realloc(store->free, places * sizeof(char *));
        if (more) {
            store->free = more;
            store->places = places;
        }
    }
    if (store->idle < most && store->idle < store->places)
        store->free[store->idle++] = memory;
    else
        buffer_free(memory, store->size);
}

static void lent_dealloc(Lent *lent)
{
    Store *store = lent->store;
    store->lent--;
    if (store->has_pool)
        store_keep(store, lent->memory);
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

PyTypeObject LentType = {
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
int begin_use(Pool *pool)
{
    if (pool->in_use) {
        PyErr_SetString(PyExc_RuntimeError, "the pool is in use by a call that has not returned");
        return -1;
    }
    pool->in_use = 1;
    return 0;
}

PyObject *end_use(Pool *pool, PyObject *result)
{
    pool->in_use = 0;
    return result;
}

/* A view of a part, whose `obj` is the whole buffer, as for a slice of a view. */
PyObject *view_of(Lent *lent, Py_ssize_t start, Py_ssize_t length, int readonly)
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
char *room_in(Pool *pool, Py_ssize_t minimum, Py_ssize_t *length)
{
    Py_ssize_t size = pool->store->size;
    if (pool->current && Py_REFCNT(pool->current) == 1)
        pool->filled = 0; /* nobody has a view of it: the same memory again is still in the caches */
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
    Store *store = malloc(sizeof(Store));
    if (!store)
        return PyErr_NoMemory();
    *store = (Store){.owners = 1, .size = size, .least_idle = idle, .has_pool = 1};
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

int check_minimum(Pool *pool, Py_ssize_t minimum)
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

/* Pass on what was put into the room.  -1 with an exception. */
int output_take(Output *output)
{
    Pool *pool = output->pool;
    Py_ssize_t count = output->filled;
    output->room += count;
    output->length -= count;
    output->filled = 0;
    if (!count)
        return 0;
    if (output->pieces) {
        if (append(output->pieces, (PyObject *)pool->current, pool->current->memory + pool->filled, count)) {
            PyErr_SetString(PyExc_BufferError, "too many pieces");
            return -1;
        }
        pool->filled += count;
        return 0;
    }
    PyObject *view = take_from(pool, count);
    if (!view)
        return -1;
    int failed = PyList_Append(output->views, view);
    Py_DECREF(view);
    return failed;
}

/* Have `minimum` bytes free.  Returns where they begin; NULL with an exception. */
unsigned char *output_room(Output *output, Py_ssize_t minimum)
{
    if (output->length - output->filled < minimum) {
        if (output_take(output))
            return NULL;
        if (!(output->room = room_in(output->pool, minimum, &output->length)))
            return NULL;
    }
    return (unsigned char *)output->room + output->filled;
}

/* How input has ended, for a call that returned no bytes: -1 at its end, an error, or 0 if there are none yet. */
int input_end(ssize_t count)
{
    if (!count)
        return -1;
    return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : errno;
}

/*
 * Read up to `limit` bytes of a socket, in rooms of `minimum` at least, and again as long as a read brings
 * `again`.  Returns how many there were, and sets `ended`: -1 at the end of input, an error where there is
 * one, else 0.  -1 with an exception.
 */
Py_ssize_t gather(Output *output, int fd, Py_ssize_t limit, Py_ssize_t minimum, Py_ssize_t again, int *ended)
{
    Py_ssize_t total = 0;
    *ended = 0;
    while (total < limit) {
        unsigned char *room = output_room(output, minimum);
        if (!room)
            return -1;
        Py_ssize_t space = output->length - output->filled;
        if (space > limit - total)
            space = limit - total;
        ssize_t count = recv(fd, room, space, MSG_DONTWAIT);
        if (count < 0 && errno == EINTR)
            continue; /* it does not wait, so signals have their turn soon */
        if (count <= 0) {
            *ended = input_end(count);
            break;
        }
        output->filled += count;
        total += count;
        if (count < again && count < space)
            break;
    }
    return output_take(output) ? -1 : total;
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
    Py_ssize_t limit = PyLong_AsSsize_t(args[1]), minimum = PyLong_AsSsize_t(args[2]);
    Py_ssize_t again = PyLong_AsSsize_t(args[3]);
    if (PyErr_Occurred() || check_minimum(pool, minimum))
        return NULL;
    Output output = {.pool = pool, .views = PyList_New(0)};
    if (!output.views || begin_use(pool)) {
        Py_XDECREF(output.views);
        return NULL;
    }
    int ended;
    Py_ssize_t total = gather(&output, fd, limit, minimum, again, &ended);
    if (total < 0) {
        Py_DECREF(output.views);
        return end_use(pool, NULL);
    }
    return end_use(pool, Py_BuildValue("(Nni)", output.views, total, ended));
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

PyTypeObject PoolType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.BufferPool",
    .tp_basicsize = sizeof(Pool),
    .tp_new = pool_new,
    .tp_dealloc = (destructor)pool_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = pool_methods,
    .tp_getset = pool_attributes,
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "relaymux.net._native",
    .m_doc = "The innermost loops of the data path, compiled.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__native(void)
{
    if (PyType_Ready(&LentType) || PyType_Ready(&PoolType))
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddObjectRef(module, "BufferPool", (PyObject *)&PoolType) ||
                   add_records(module) || add_fastpath(module)))
        Py_CLEAR(module);
    return module;
}
