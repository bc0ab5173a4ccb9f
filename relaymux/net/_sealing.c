/* Making TLS 1.3 records (RFC 8446, 5.2). */

#include "_records.h"

#include <string.h>

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

PyObject *sealer_seal(Records *records, PyObject *const *args, Py_ssize_t nargs)
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
