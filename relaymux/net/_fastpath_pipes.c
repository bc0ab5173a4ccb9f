/*
 * Pages: pipes by which pages of memory are passed on and not copied.
 *
 * A pipe holds references to pages (splice(2)), and tee(2) makes more of them.  So what a local
 * socket gave goes into the pipe `out`, behind the header of its frame, from there a second
 * reference into a `store`, where it waits to be acknowledged, and the first one to the link; what
 * the link gave goes through the pipe `in`.  At the end of a lease all of them are emptied.
 *
 * None of these calls waits, as all sockets and pipes are O_NONBLOCK (SPLICE_F_NONBLOCK is not for
 * sockets that are written), and none is to end the process by SIGPIPE, which Python ignores.
 */

#include "_fastpath.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <structmember.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
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
 * Take up to `limit` bytes of a socket: what there is, as far as the pipe has places.  Sets `*ended` as gather()
 * does.
 */
Py_ssize_t pages_take(int fd, const Pipe *pipe, Py_ssize_t limit, int *ended)
{
    ssize_t count = pass(fd, pipe->write, limit);
    *ended = count > 0 ? 0 : input_end(count);
    return count > 0 ? count : 0;
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

/*
 * Have the empty `out` begin with `size` bytes, at most HEAD, that the caller writes to where this returns, before
 * anybody reads them.  NULL, without an exception: it does not.
 *
 * They are not copied either.  So nobody is to write there again until they are read at the far end: not before
 * the frame is acknowledged, and MOST_SENT of a lease are not, at most.  So each frame that leaves has a place of
 * its own, see pages_led(), and what another lease has left somewhere a page of its own, see pages_open().
 */
unsigned char *pages_begin(Pages *pages, Py_ssize_t size)
{
    unsigned char *head = pages->heads + HEAD * pages->next_head;
    struct iovec one = {.iov_base = head, .iov_len = size};
    ssize_t count;
    *head = 0; /* so that it is the page that is written to later, and not one that is shared until then */
    do
        count = vmsplice(pages->out.write, &one, 1, SPLICE_F_NONBLOCK);
    while (count < 0 && errno == EINTR);
    return count == size ? head : NULL;
}

/* A frame leaves with what it begins with. */
void pages_led(Pages *pages)
{
    pages->next_head = (pages->next_head + 1) % HEADS;
}

/* A new page for what frames begin with; who has the old one keeps it.  0, or -1 with `errno`. */
static int renew_heads(Pages *pages)
{
    return madvise(pages->heads, HEAD * HEADS, MADV_DONTNEED);
}

/* Begin with a lease: 0, or -1 with `errno`. */
int pages_open(Pages *pages)
{
    if (renew_heads(pages))
        return -1;
    pages->is_lent = 1;
    pages->was_full = 0;
    return 0;
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

/* Drop the first `*length` bytes of a pipe, and count them down.  -1 with an exception. */
int pages_drop(const Pages *pages, const Pipe *pipe, Py_ssize_t *length)
{
    while (*length) {
        ssize_t count = pass(pipe->read, pages->nowhere, *length);
        if (count <= 0) {
            if (!count)
                errno = EIO;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
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

/* The same with the oldest bytes that are stored; without an output they are dropped. */
int pages_unstore(Pages *pages, Py_ssize_t *length, Output *output)
{
    while (*length) {
        Py_ssize_t here = oldest(pages);
        if (!here) {
            errno = EIO;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        const Pipe *store = &pages->store[pages->first];
        Py_ssize_t part = here < *length ? here : *length, left = part;
        int failed = output ? pages_copy(store, &left, output) : pages_drop(pages, store, &left);
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
    close_pipe(&pages->in);
    for (int i = 0; i < STORES; i++)
        close_pipe(&pages->store[i]);
    if (pages->nowhere >= 0)
        close(pages->nowhere);
    if (pages->heads)
        munmap(pages->heads, HEAD * HEADS);
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

/* Whether bytes come through, also what is written to a page that is on its way: 0, or -1 with `errno`. */
static int try_pages(Pages *pages)
{
    int ends[2], error = 0;
    char bytes[2] = {2, 0};
    unsigned char *head;
    if (renew_heads(pages) || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends))
        return -1;
    int done = (head = pages_begin(pages, 1)) && send(ends[0], bytes, 1, MSG_NOSIGNAL) == 1 &&
               pass(ends[1], pages->out.write, 1) == 1 && (*head = 1) &&
               tee(pages->out.read, pages->in.write, 2, SPLICE_F_NONBLOCK) == 2 &&
               pass(pages->out.read, ends[1], 2) == 2 && pass(pages->in.read, pages->nowhere, 2) == 2 &&
               recv(ends[0], bytes, 2, 0) == 2;
    if (!done)
        error = errno;
    else if (bytes[0] != 1 || bytes[1] != 2)
        error = ENOTSUP;
    close(ends[0]);
    close(ends[1]);
    errno = error;
    return error ? -1 : 0;
}

static PyObject *pages_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    if (!PyArg_ParseTuple(args, ":Pages"))
        return NULL;
    Pages *pages = (Pages *)type->tp_alloc(type, 0);
    if (!pages)
        return NULL;
    void *heads = mmap(NULL, HEAD * HEADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pages->heads = heads == MAP_FAILED ? NULL : heads;
    pages->nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    int failed = !pages->heads || pages->nowhere < 0 || open_pipe(&pages->out) || open_pipe(&pages->in);
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
