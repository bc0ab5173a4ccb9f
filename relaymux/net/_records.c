/*
 * TLS 1.3 records (RFC 8446, 5.2), which a cipher of Python's encrypts and decrypts: what costs per record.
 *
 * A cipher may release the GIL (that of pyca/cryptography does), so nothing that other threads look at may
 * be in a pool's buffers while records are sealed: see `in_use`.
 */

#include "_native.h"

#include <string.h>

/* The most that one record holds, its header, and what encryption adds: a type and a tag. */
#define RECORD 16384
#define HEADER 5
#define TAG 16
#define SEALED_RECORD (HEADER + RECORD + 1 + TAG)

/* The most that a record may have behind its header (5.2). */
#define CIPHERTEXT (RECORD + 256)

#define NONCE 12

/* Alerts (B.2). */
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
struct Records {
    PyObject_HEAD
    PyObject *cipher; /* what encrypts or decrypts into given memory */
    Window *windows[ARGUMENTS];
    unsigned char iv[NONCE], nonce[NONCE];
    unsigned long long records;
    /* Of a Sealer: the plain bytes of the next record.  Of an Opener: a record that is not complete. */
    int filled;
    int in_use; /* by a call that has not returned: a cipher may release the GIL */
    unsigned char record[HEADER + CIPHERTEXT];
};

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

/* Between the two nobody else makes or reads records with it. */
void use_records(Records *records, int use)
{
    records->in_use = use;
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
 * The end of the pool's buffer that `owner` keeps, or is a view of; NULL if it is not one, or if records
 * are put into that very buffer: the byte behind the piece may be the first of one.
 */
static const char *end_of_buffer(PyObject *owner, const Pool *output)
{
    PyObject *base = owner && PyMemoryView_Check(owner) ? PyMemoryView_GET_BASE(owner) : owner;
    if (!base || !Py_IS_TYPE(base, &LentType) || base == (PyObject *)output->current)
        return NULL;
    Lent *lent = (Lent *)base;
    return lent->memory + lent->store->size;
}

/* Encrypt a piece, but for what does not fill a record. */
static int seal_piece(Records *records, char *next, Py_ssize_t left, PyObject *owner, int type, Output *output)
{
    const char *end = end_of_buffer(owner, output->pool);
    while (left) {
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

/* The end of what is to be encrypted.  -1 with an exception. */
static int seal_rest(Records *records, int type, Output *output)
{
    if (records->filled && seal_record(records, records->record, records->filled, type, output))
        return -1;
    records->filled = 0;
    return output_take(output);
}

/* Encrypt all of them; records are full, but for the last one.  -1 with an exception. */
int seal(Records *records, const Pieces *plain, int type, Output *output)
{
    records->filled = 0;
    for (int i = 0; i < plain->count; i++) {
        const Piece *piece = &plain->piece[i];
        if (seal_piece(records, piece->memory, piece->length, piece->owner, type, output))
            return -1;
    }
    return seal_rest(records, type, output);
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
        failed = seal_piece(records, data.buf, data.len, piece, type, &output);
        PyBuffer_Release(&data);
    }
    if (!failed)
        failed = seal_rest(records, type, &output);
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

/*
 * Decrypt `length` bytes that have arrived, up to a record that is no application data, or not as it should be:
 * sets how many were used, and what is odd.  -1 with an exception.
 */
int open_records(Records *records, PyObject *wrong_tag, char *data, Py_ssize_t length, Py_ssize_t *used,
                 Output *output, Odd *odd)
{
    int size;
    unsigned char *record;
    *used = 0;
    *odd = (Odd){0};
    while (!odd->type &&
           (record = next_record(records, (unsigned char *)data, length, used, &size, &odd->alert))) {
        int inner = size - TAG;
        unsigned char *room = output_room(output, CIPHERTEXT);
        if (!room)
            goto fail;
        if (protect(records, record, record + HEADER, size, room, inner)) {
            if (!PyErr_ExceptionMatches(wrong_tag))
                goto fail;
            PyErr_Clear();
            odd->alert = BAD_RECORD_MAC;
            break;
        }
        if (inner > RECORD + 1) {
            odd->alert = RECORD_OVERFLOW;
            break;
        }
        while (inner && !room[inner - 1])
            inner--; /* padding */
        if (!inner--) {
            odd->alert = UNEXPECTED_MESSAGE;
            break;
        }
        if (room[inner] == APPLICATION_DATA) {
            output->filled += inner;
            continue;
        }
        odd->type = room[inner];
        if (!(odd->message = PyBytes_FromStringAndSize((char *)room, inner)))
            goto fail;
    }
    if (!output_take(output))
        return 0;
fail:
    Py_CLEAR(odd->message);
    return -1;
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
    output.views = PyList_New(0);
    if (!output.views || begin_records(records, output.pool)) {
        PyBuffer_Release(&data);
        Py_XDECREF(output.views);
        return NULL;
    }
    Py_ssize_t used;
    Odd odd;
    int failed = open_records(records, args[2], data.buf, data.len, &used, &output, &odd);
    PyBuffer_Release(&data);
    if (failed) {
        Py_DECREF(output.views);
        return end_records(records, output.pool, NULL);
    }
    PyObject *message = odd.message ? odd.message : Py_NewRef(Py_None);
    return end_records(records, output.pool,
                       Py_BuildValue("(NniiN)", output.views, used, odd.alert, odd.type, message));
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

PyTypeObject SealerType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Sealer",
    .tp_base = &RecordsType,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = sealer_methods,
};

PyTypeObject OpenerType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Opener",
    .tp_base = &RecordsType,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = opener_methods,
};

int add_records(PyObject *module)
{
    if (PyType_Ready(&WindowType) || PyType_Ready(&RecordsType) || PyType_Ready(&SealerType) ||
        PyType_Ready(&OpenerType))
        return -1;
    return PyModule_AddObjectRef(module, "Sealer", (PyObject *)&SealerType) ||
                   PyModule_AddObjectRef(module, "Opener", (PyObject *)&OpenerType)
               ? -1
               : 0;
}
