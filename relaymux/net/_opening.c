/* Reading TLS 1.3 records (RFC 8446, 5.2). */

#include "_records.h"

#include <string.h>

/* Alerts (B.2). */
enum { UNEXPECTED_MESSAGE = 10, BAD_RECORD_MAC = 20, RECORD_OVERFLOW = 22 };

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

PyObject *opener_open(Records *records, PyObject *const *args, Py_ssize_t nargs)
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
