// Stands in for envd where the runtime is runc: answers every request with the status in /answer.
// Keeps the last body in /init.json. Listens on the sandbox's own address, the last in /etc/hosts,
// because all sandboxes of the test share one network.
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char request[65536], answer[256], address[64];

static size_t read_file(const char *path, char *into, size_t size) {
    FILE *file = fopen(path, "r");
    size_t length = file ? fread(into, 1, size - 1, file) : 0;
    if (file) fclose(file);
    into[length] = 0;
    return length;
}

static void serve(int client) {
    size_t length = 0;
    char *body = NULL, *field;
    while (length < sizeof request - 1) {
        ssize_t got = read(client, request + length, sizeof request - 1 - length);
        if (got <= 0) return;
        length += got;
        request[length] = 0;
        if (!body && (body = strstr(request, "\r\n\r\n"))) body += 4;
        if (!body) continue;
        field = strstr(request, "Content-Length: ");
        size_t wanted = field && field < body ? atoi(field + 16) : 0;
        if (length - (body - request) < wanted) continue;
        if (wanted) {
            FILE *file = fopen("/init.json", "w");
            fwrite(body, 1, wanted, file);
            fclose(file);
        }
        dprintf(client, "HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", answer);
        return;
    }
}

int main(void) {
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons(49983)};
    char hosts[4096], *line = hosts;
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    read_file("/etc/hosts", hosts, sizeof hosts);
    read_file("/answer", answer, sizeof answer);
    for (char *next = line; next && *next; next = strchr(next, '\n') ? strchr(next, '\n') + 1 : NULL)
        line = next;
    sscanf(line, "%63s", address);
    inet_pton(AF_INET, address, &where.sin_addr);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&where, sizeof where) || listen(listener, 8)) return 3;
    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (answer[0]) serve(client); else pause();
        close(client);
    }
}
