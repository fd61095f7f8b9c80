/*
The names of functions, from the program's own symbol table. (CUDA has a table of the registered kernels.)

    printf("%s\n", simt::function_name((const void*)kernel));     // mangled; "?" in a program that was stripped
*/
#ifndef DEV_SIMT_NAMES_H
#define DEV_SIMT_NAMES_H

#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace simt {

struct SymbolTable {
    const Elf64_Sym* symbols;
    size_t count;
    const char* names;
};

// dl_iterate_phdr() reports the main program first.
inline int note_load_address(dl_phdr_info* program, size_t, void* address) {
    *(uintptr_t*)address = program->dlpi_addr;
    return 1;
}

// Reads the symbols of the program's own file, which stays mapped.
inline SymbolTable read_symbols() {
    SymbolTable table = {nullptr, 0, nullptr};
    const int file = open("/proc/self/exe", O_RDONLY);
    struct stat status;
    if (file < 0) return table;
    const bool known = fstat(file, &status) == 0;
    void* memory =
        known ? mmap(nullptr, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    close(file);
    if (memory == MAP_FAILED) return table;
    const char* bytes = (const char*)memory;
    const Elf64_Ehdr* header = (const Elf64_Ehdr*)memory;
    const Elf64_Shdr* sections = (const Elf64_Shdr*)(bytes + header->e_shoff);
    for (int i = 0; i < header->e_shnum; i++)
        if (sections[i].sh_type == SHT_SYMTAB) {
            table.symbols = (const Elf64_Sym*)(bytes + sections[i].sh_offset);
            table.count = sections[i].sh_size / sizeof(Elf64_Sym);
            table.names = bytes + sections[sections[i].sh_link].sh_offset;
        }
    return table;
}

inline const char* function_name(const void* function) {
    static const SymbolTable table = read_symbols();
    uintptr_t load_address = 0;
    dl_iterate_phdr(note_load_address, &load_address);
    for (size_t i = 0; i < table.count; i++)
        if (ELF64_ST_TYPE(table.symbols[i].st_info) == STT_FUNC &&
            table.symbols[i].st_value + load_address == (uintptr_t)function)
            return table.names + table.symbols[i].st_name;
    return "?";
}

} // namespace simt

#endif
