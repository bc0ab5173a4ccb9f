/* The fast path without copies: both ways of bytes whose pages are passed on (_fastpath_pipes.c). */

#include "_fastpath.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

/* Bytes to read of a link at once as long as it brings no DATA: many ACKs and CREDITs. */
#define CONTROL_TURN 512

/*
 * Send up to `most` bytes of a local socket that stay where they are, behind `head`, with which `out` begins; the
 * caller has asked whether they can be stored.  -1 with an exception.
 */
int send_pages(Lease *lease, Stream *stream, Py_ssize_t most, unsigned char *head)
{
    Pages *pages = lease->pages;
    Py_ssize_t size = lead_length(lease);
    Py_ssize_t length = pages_take(stream->fd, &pages->out, most, &stream->read_end);
    if (stream->read_end)
        lease->over = 1;
    Py_ssize_t useless = length ? pages_store(pages, size + length) : pages_drop(pages, &pages->out, &size);
    if (useless < 0) {
        lease->lost = lease->over = 1;
        return -1;
    }
    if (!length)
        return 0;
    lead(lease, stream, length, head);
    pages_led(pages);
    Sent *sent = keep_data(lease, stream, length);
    sent->stored = length;
    sent->useless = useless + size;
    lease->leaving = size + length;
    push(lease);
    return 0;
}

/* Read up to `length` bytes of the link.  Returns how many there were. */
static Py_ssize_t receive(Lease *lease, unsigned char *to, Py_ssize_t length)
{
    ssize_t count;
    do
        count = recv(lease->fd, to, length, MSG_DONTWAIT);
    while (count < 0 && errno == EINTR);
    if (count > 0)
        return count;
    lease->read_end = input_end(count);
    return 0;
}

/* The next bytes of a header.  Returns how many there were; -1 with an exception. */
static Py_ssize_t take_header(Lease *lease, int *lost)
{
    Py_ssize_t count = receive(lease, lease->header + lease->header_length, HEADER - lease->header_length);
    lease->header_length += count;
    if (lease->header_length < HEADER)
        return count;
    if (!begin_frame(lease))
        *lost = give_up_frame(lease);
    else if (lease->kind == DATA && lease->whole && lease->whole_stream != lease->stream)
        deliver(lease, lease->whole_stream);
    return *lost ? -1 : count;
}

/* The next bytes of the payload of an ACK or CREDIT.  The same. */
static Py_ssize_t take_few(Lease *lease, int *lost)
{
    if (lease->payload.count == MOST_PIECES)
        return (*lost = give_up_frame(lease));
    unsigned char *to = lease->few + lease->payload.length;
    Py_ssize_t count = receive(lease, to, lease->missing);
    append(&lease->payload, NULL, (char *)to, count);
    lease->missing -= count;
    return count;
}

/* The next bytes of the payload of DATA.  The same. */
static Py_ssize_t take_payload(Lease *lease, int is_first, int *lost)
{
    Pipe *in = &lease->pages->in;
    Py_ssize_t count = pages_take(lease->fd, in, lease->missing, &lease->read_end);
    lease->arriving += count;
    lease->missing -= count;
    if (count || !is_first || !lease->arriving || lease->read_end)
        return count;
    /* There is something, and the pipe has no place for it: its places hold few bytes each. */
    lease->pages->was_full = 1;
    if (lease->payload.count + lease->arriving / lease->pool->store->size + 2 > MOST_PIECES)
        return (*lost = give_up_frame(lease));
    Output output = {.pool = lease->pool, .pieces = &lease->payload};
    return pages_copy(in, &lease->arriving, &output) ? -1 : 1; /* at least */
}

/*
 * Read the link as far as its frames are whole, and leave pages where they are.  Sets `*lost` as take_pieces().
 * -1 with an exception.
 *
 * In memory (`untaken`, `payload`) is only what comes before all that is in the pipe for the same stream: what
 * Python had, what was read with control frames before the first DATA, and what is copied when a turn begins,
 * as at that time nothing in the pipe is `whole`.
 */
int take_pages(Lease *lease, int *lost)
{
    Py_ssize_t total = 0, count = 1;
    for (int is_first = 1; count > 0 && total < lease->link_turn; is_first = 0) {
        if (lease->over || lease->read_end)
            break;
        if (lease->header_length == HEADER)
            count = lease->kind == DATA ? take_payload(lease, is_first, lost) : take_few(lease, lost);
        else if (lease->gets_data || lease->header_length)
            count = take_header(lease, lost);
        else
            count = take_pieces(lease, CONTROL_TURN, CONTROL_TURN, lost);
        total += count;
        if (!lease->header_length && !lease->gets_data && count < CONTROL_TURN)
            break; /* there is no more, or it failed */
        if (count < 0 || lease->header_length < HEADER || lease->missing)
            continue;
        if (!end_frame(lease))
            lease->header_length = 0;
        else if ((*lost = give_up_frame(lease)))
            count = -1;
    }
    if (!total && !lease->read_end)
        lease->over = 1; /* something is there that is not for splice(), as urgent data is */
    return count < 0 ? -1 : 0;
}
