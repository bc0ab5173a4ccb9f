/* Bytes in pooled memory: put together, cut, shown to Python, and written to sockets. */

#include "_native.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

void drop(Pieces *pieces)
{
    for (int i = 0; i < pieces->count; i++)
        Py_XDECREF(pieces->piece[i].owner);
    pieces->count = 0;
    pieces->length = 0;
}

/*
 * Append; one that lies behind the last one makes that longer.  -1, without an exception: there are too
 * many.
 */
int append(Pieces *pieces, PyObject *owner, char *memory, Py_ssize_t length)
{
    if (!length)
        return 0;
    Piece *last = pieces->count ? &pieces->piece[pieces->count - 1] : NULL;
    if (last && owner && last->owner == owner && last->memory + last->length == memory) {
        last->length += length;
    } else if (pieces->count == MOST_PIECES) {
        return -1;
    } else {
        pieces->piece[pieces->count++] = (Piece){Py_XNewRef(owner), memory, length};
    }
    pieces->length += length;
    return 0;
}

/* Without the first `count` bytes. */
static void shorten(Pieces *pieces, Py_ssize_t count)
{
    int gone = 0;
    pieces->length -= count;
    while (gone < pieces->count && count >= pieces->piece[gone].length)
        count -= pieces->piece[gone++].length;
    for (int i = 0; i < gone; i++)
        Py_XDECREF(pieces->piece[i].owner);
    pieces->count -= gone;
    memmove(pieces->piece, pieces->piece + gone, pieces->count * sizeof(Piece));
    if (count) {
        pieces->piece[0].memory += count;
        pieces->piece[0].length -= count;
    }
}

/* As what Python passes on. */
static PyObject *as_buffer(const Piece *piece)
{
    if (!piece->owner)
        return PyBytes_FromStringAndSize(piece->memory, piece->length);
    if (Py_IS_TYPE(piece->owner, &LentType)) {
        Lent *lent = (Lent *)piece->owner;
        return view_of(lent, piece->memory - lent->memory, piece->length, 1);
    }
    Py_buffer *whole = PyMemoryView_GET_BUFFER(piece->owner);
    Py_ssize_t start = piece->memory - (char *)whole->buf;
    return PySequence_GetSlice(piece->owner, start, start + piece->length);
}

/* Append a piece to a list of Python's; nothing is appended for no bytes.  -1 with an exception. */
int append_buffer(PyObject *list, const Piece *piece)
{
    if (!piece->length)
        return 0;
    PyObject *buffer = as_buffer(piece);
    int failed = !buffer || PyList_Append(list, buffer);
    Py_XDECREF(buffer);
    return failed ? -1 : 0;
}

int append_buffers(PyObject *list, const Pieces *pieces)
{
    for (int i = 0; i < pieces->count; i++)
        if (append_buffer(list, &pieces->piece[i]))
            return -1;
    return 0;
}

PyObject *as_list(const Pieces *pieces)
{
    PyObject *list = PyList_New(0);
    if (list && append_buffers(list, pieces))
        Py_CLEAR(list);
    return list;
}

/*
 * Write, and leave in `pieces` what the socket did not take.  Returns the bytes that it took, and sets
 * `error` where it never will.
 */
Py_ssize_t put(int fd, Pieces *pieces, int *error)
{
    struct iovec parts[MOST_PIECES];
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = pieces->count};
    for (int i = 0; i < pieces->count; i++)
        parts[i] = (struct iovec){pieces->piece[i].memory, pieces->piece[i].length};
    ssize_t count;
    do
        count = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (count < 0 && errno == EINTR);
    if (count < 0) {
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            *error = errno;
        return 0;
    }
    if (count == pieces->length)
        drop(pieces);
    else
        shorten(pieces, count);
    return count;
}
