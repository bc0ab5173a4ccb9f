/*
 * Pages: pipes by which pages of memory are passed on and not copied.
 *
 * A pipe holds references to pages (splice(2)), and tee(2) makes more of them.  So what a local
 * socket gave goes into the pipe `out`, from there a second reference into a `store`, where it
 * waits to be acknowledged, and the first one into `line`, behind the header of its frame, and to
 * the link; what the link gave goes through the pipe `in`.  At the end of a lease all of them are
 * emptied.
 *
 * None of these calls waits, as all sockets and pipes are O_NONBLOCK (SPLICE_F_NONBLOCK is not for
 * sockets that are written), and none is to end the process by SIGPIPE, which Python ignores.
 */

#include "_fastpath.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <structmember.h>
#include <sys/socket.h>
#include <unistd.h>

/* Bytes that a pipe can hold if all of its pages are full; what an ordinary user may have at most. */
#define PIPE_SIZE (1024 * 1024)

static ssize_t pass(int from, int to, size_t length)
{
    ssize_t count;
    do
        count = splice(from, NULL, to, NULL, length, SPLICE_F_NONBLOCK);
    while (count < 0 && errno == EINTR);
    return count;
}

/*
 * Take up to `limit` bytes of a socket, as gather() does.  With `*ended` 0 and fewer than that there are no
 * more at the moment, or the pipe is full.
 */
Py_ssize_t pages_take(int fd, const Pipe *pipe, Py_ssize_t limit, Py_ssize_t again, int *ended)
{
    Py_ssize_t total = 0;
    *ended = 0;
    while (total < limit) {
        ssize_t count = pass(fd, pipe->write, limit - total);
        if (count <= 0) {
            *ended = input_end(count);
            break;
        }
        total += count;
        if (count < again)
            break;
    }
    return total;
}

/* Have a socket take the first `length` bytes of a pipe; as put(). */
Py_ssize_t pages_put(int fd, const Pipe *pipe, Py_ssize_t length, int *error)
{
    Py_ssize_t total = 0;
    while (total < length) {
        ssize_t count = pass(pipe->read, fd, length - total);
        if (count <= 0) {
            if (count && errno != EAGAIN && errno != EWOULDBLOCK)
                *error = errno;
            break;
        }
        total += count;
    }
    return total;
}

static int next_store(const Pages *pages)
{
    return (pages->last + 1) % STORES;
}

/* How much is in the oldest store that is not empty. */
static Py_ssize_t oldest(Pages *pages)
{
    while (!pages->stored[pages->first] && pages->first != pages->last)
        pages->first = (pages->first + 1) % STORES;
    return pages->stored[pages->first];
}

/* Whether whatever is in `out` can be stored. */
int pages_can_store(const Pages *pages)
{
    return !pages->stored[pages->last] || !pages->stored[next_store(pages)];
}

/*
 * Store what is in `out`, `length` bytes, where there is room for it.  Returns how many bytes lie before them
 * that nobody needs: those which a store had room for that was full then.  -1 with an exception.
 */
Py_ssize_t pages_store(Pages *pages, Py_ssize_t length)
{
    Py_ssize_t useless = 0;
    for (int tries = 0; tries < 2; tries++) {
        ssize_t count = tee(pages->out.read, pages->store[pages->last].write, length, SPLICE_F_NONBLOCK);
        if (count > 0)
            pages->stored[pages->last] += count;
        if (count == length)
            return useless;
        if (count < 0 && errno != EAGAIN)
            break;
        if (count > 0)
            useless += count;
        errno = EIO; /* which an empty one never is, as `out` holds no more */
        if (pages->stored[next_store(pages)])
            break;
        oldest(pages); /* so that `first` is not what becomes the last one */
        pages->last = next_store(pages);
    }
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

/*
 * Put `head` and what is in `out`, `length` bytes, into the empty `line`, which is to leave first.  Returns how
 * many of these have found room there; -1 without an exception: not even the head has.
 */
Py_ssize_t pages_lead(Pages *pages, const void *head, Py_ssize_t size, Py_ssize_t length)
{
    ssize_t count = write(pages->line.write, head, size); /* at once, or nothing: PIPE_BUF, pipe(7) */
    if (count != size)
        return -1;
    count = pass(pages->out.read, pages->line.write, length);
    return count > 0 ? count : 0;
}

/* Drop the oldest `*length` bytes that are stored, and count them down.  -1 with an exception. */
int pages_forget(Pages *pages, Py_ssize_t *length)
{
    while (*length) {
        Py_ssize_t here = oldest(pages);
        ssize_t count = pass(pages->store[pages->first].read, pages->nowhere, here < *length ? here : *length);
        if (count <= 0) {
            if (!count)
                errno = EIO;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        pages->stored[pages->first] -= count;
        *length -= count;
    }
    return 0;
}

/*
 * Copy the first `*length` bytes of a pipe, and remove them there.  -1 with an exception: `*length` are left, and
 * the others copied, if there was no memory for more of a pool.
 */
int pages_copy(const Pipe *pipe, Py_ssize_t *length, Output *output)
{
    while (*length) {
        unsigned char *room = output_room(output, 1);
        if (!room)
            return -1;
        Py_ssize_t space = output->length - output->filled;
        ssize_t count = read(pipe->read, room, space < *length ? space : *length);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0) {
            int error = count ? errno : EIO;
            if (output_take(output))
                return -1;
            errno = error;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        output->filled += count;
        *length -= count;
    }
    return output_take(output);
}

/* The same with the oldest bytes that are stored. */
int pages_copy_stored(Pages *pages, Py_ssize_t *length, Output *output)
{
    while (*length) {
        Py_ssize_t here = oldest(pages);
        if (!here) {
            errno = EIO;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        Py_ssize_t part = here < *length ? here : *length, left = part;
        int failed = pages_copy(&pages->store[pages->first], &left, output);
        pages->stored[pages->first] -= part - left;
        *length -= part - left;
        if (failed)
            return -1;
    }
    return 0;
}

static void close_pipe(Pipe *pipe)
{
    if (!pipe->is_open)
        return;
    close(pipe->read);
    close(pipe->write);
}

static void pages_dealloc(Pages *pages)
{
    close_pipe(&pages->out);
    close_pipe(&pages->line);
    close_pipe(&pages->in);
    for (int i = 0; i < STORES; i++)
        close_pipe(&pages->store[i]);
    if (pages->nowhere >= 0)
        close(pages->nowhere);
    Py_TYPE(pages)->tp_free(pages);
}

/* 0, or -1 with `errno`. */
static int open_pipe(Pipe *pipe)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
        return -1;
    *pipe = (Pipe){.read = ends[0], .write = ends[1], .is_open = 1};
    int size = fcntl(pipe->write, F_SETPIPE_SZ, PIPE_SIZE);
    if (size >= 0 && size != PIPE_SIZE)
        errno = EPERM;
    return size == PIPE_SIZE ? 0 : -1;
}

/* Whether a byte comes through: 0, or -1 with `errno`. */
static int try_pages(Pages *pages)
{
    int ends[2], error = 0;
    char byte = 1;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends))
        return -1;
    int done = send(ends[0], &byte, 1, MSG_NOSIGNAL) == 1 && pass(ends[1], pages->out.write, 1) == 1 &&
               tee(pages->out.read, pages->in.write, 1, SPLICE_F_NONBLOCK) == 1 &&
               pass(pages->out.read, ends[1], 1) == 1 && pass(pages->in.read, pages->nowhere, 1) == 1;
    if (!done)
        error = errno;
    close(ends[0]);
    close(ends[1]);
    errno = error;
    return done ? 0 : -1;
}

static PyObject *pages_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    if (!PyArg_ParseTuple(args, ":Pages"))
        return NULL;
    Pages *pages = (Pages *)type->tp_alloc(type, 0);
    if (!pages)
        return NULL;
    pages->nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    int failed = pages->nowhere < 0 || open_pipe(&pages->out) || open_pipe(&pages->line) || open_pipe(&pages->in);
    for (int i = 0; i < STORES && !failed; i++)
        failed = open_pipe(&pages->store[i]);
    if (failed || try_pages(pages)) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_CLEAR(pages);
    }
    return (PyObject *)pages;
}

static PyMemberDef pages_members[] = {
    {"was_full", T_INT, offsetof(Pages, was_full), READONLY, NULL},
    {NULL},
};

PyTypeObject PagesType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Pages",
    .tp_basicsize = sizeof(Pages),
    .tp_new = pages_new,
    .tp_dealloc = (destructor)pages_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_members = pages_members,
};
